"""What `analyze` answered: each question with the one chart that says most, and its rows as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quant_fairness_plugin.artifacts import AnalysisAnswer
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table, shade
from quant_fairness_plugin.report.words import Cell, Figure, Language

Row = Mapping[str, Any]
_MOST_ROWS = 60
"""Of a chart and of a table; the file has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """Which rows of an answer are drawn, and how."""

    kind: Literal["intervals", "bars", "map"]
    rows: str
    label: tuple[str, ...]
    """Fields that name a row; of a map, the field of its rows and that of its columns."""
    value: str
    title: str
    minus: str = ""
    """A field that is taken off the value."""
    times: float = 1.0


_CHARTS = {
    "weights": _Chart(
        kind="bars", rows="layers", label=("layer",), value="kurtosis", title="excess kurtosis of a layer's weights"
    ),
    "tokens": _Chart(
        kind="intervals", rows="languages", label=("language",), value="per_sentence", title="tokens of a sentence"
    ),
    "representations": _Chart(
        kind="map", rows="layers", label=("layer", "language"), value="relative_error", times=100.0,
        title="error of a layer's output over its size, in percent",
    ),
    "interventions": _Chart(
        kind="intervals", rows="plans", label=("kind", "plan"), value="worst_kl",
        title="loss of the worst language, bits per byte",
    ),
    "choices": _Chart(
        kind="intervals", rows="rows", label=("language", "group"), value="drop", title="share of the questions lost"
    ),
    "hypotheses": _Chart(
        kind="intervals", rows="claims", label=("figure",), value="rho", title="rank correlation with the damage"
    ),
    "configurations": _Chart(
        kind="intervals", rows="configurations", label=("kept",), value="worst_kl",
        title="loss of the worst language, bits per byte",
    ),
    "clipping": _Chart(
        kind="map", rows="languages", label=("layer", "language"), value="global_error", minus="best_error",
        title="error of one threshold for all languages beyond that of the language's own, thousandths", times=1000.0,
    ),
    "depth": _Chart(
        kind="intervals", rows="pairs", label=("first", "second", "mode"), value="tau",
        title="Kendall's τ of what layers at the same relative depth are worth",
    ),
}  # fmt: skip
"""An analysis without an entry is shown as a table."""


def analysis_section(answer: AnalysisAnswer) -> Section | None:
    """Return the part of one answer; None where it has no rows."""
    how = _CHARTS.get(answer.analysis)
    rows = answer.result.get(how.rows) if how else _first_rows(answer.result)
    if not isinstance(rows, list) or not rows:
        return None
    drawn = [row for row in rows if how is not None and _estimate(row, how) is not None][:_MOST_ROWS]
    return Section(
        name=f"analysis-{answer.analysis}",
        title=answer.question or answer.analysis,
        level="researcher",
        lead=_lead(answer, how, drawn, rows),
        picture=_picture(how, drawn) if how is not None and drawn else None,
        keys=_keys(how) if drawn else (),
        table=_table(answer, rows),
        table_open=not drawn,
    )


def _first_rows(result: Row) -> list[Row]:
    return next((value for value in result.values() if isinstance(value, list) and _is_rows(value)), [])


def _is_rows(value: Sequence[Any]) -> bool:
    return bool(value) and isinstance(value[0], dict)


def _estimate(row: Row, how: _Chart) -> float | None:
    """Return the figure of a row that is drawn; None where it is undefined or missing."""
    values = [_number(row.get(name)) for name in (how.value, how.minus) if name]
    if any(value is None for value in values):
        return None
    first, *rest = [value for value in values if value is not None]
    return how.times * (first - sum(rest))


def _number(value: Any) -> float | None:
    if isinstance(value, dict):
        value = value.get("estimate")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _label(row: Row, names: Sequence[str]) -> str:
    return " ".join(Language.of(row[name]).label if name == "language" else str(row[name]) for name in names)


def _lead(answer: AnalysisAnswer, how: _Chart | None, drawn: Sequence[Row], rows: Sequence[Row]) -> str:
    if how is None or not drawn:
        return f"{len(rows)} rows of `analyze {answer.analysis}`."
    best = max(drawn, key=lambda row: _estimate(row, how) or 0.0)
    unit = "layer " if how.label[0] == "layer" else ""
    said = f"Largest at {unit}{_label(best, how.label)}: {_estimate(best, how):.3g} ({how.title})."
    return said if len(rows) <= len(drawn) else f"{said} {len(drawn)} of {len(rows)} rows are drawn."


def _picture(how: _Chart, rows: Sequence[Row]) -> Picture:
    makers: dict[str, Callable[[int], Any]] = {
        "intervals": lambda width: charts.intervals(
            _dots(how, rows), states=["value"], bound=None, width=width, title=how.title
        ),
        "bars": lambda width: charts.bars(
            [f"layer {_label(row, how.label)}" if how.label == ("layer",) else _label(row, how.label) for row in rows],
            [_estimate(row, how) or 0.0 for row in rows], title=how.title, width=width, digits=2,
        ),
        "map": lambda width: _map(how, rows, width),
    }  # fmt: skip
    said = "; ".join(f"{_label(row, how.label)} {_estimate(row, how):.3g}" for row in rows)
    return Picture.of(makers[how.kind], f"{how.title}: {said}.")


def _dots(how: _Chart, rows: Sequence[Row]) -> list[charts.Dot]:
    dots = []
    for row in rows:
        value, estimate = row[how.value], _estimate(row, how) or 0.0
        low, high = (how.times * value[end] for end in ("low", "high")) if isinstance(value, dict) else (estimate,) * 2
        label = _label(row, how.label)
        dots.append(
            charts.Dot(label=label, state="value", estimate=estimate, low=low, high=high, text=f"{estimate:.3g}")
        )
    return dots


def _map(how: _Chart, rows: Sequence[Row], width: int) -> Any:
    down, across = how.label
    values = [(row, _estimate(row, how) or 0.0) for row in rows]
    most = max(value for _, value in values)
    cells = [
        charts.Tile(
            row=_label(row, (down,)), column=_label(row, (across,)), text=f"{value:.3g}",
            shade=shade(value, most, charts.CLASSES),
        )
        for row, value in values
    ]  # fmt: skip
    return charts.tiles(cells, columns=list(dict.fromkeys(cell.column for cell in cells)), width=width)


def _keys(how: _Chart | None) -> tuple[Key, ...]:
    if how is None or how.kind == "bars":
        return ()
    if how.kind == "map":
        return Key(symbol="shade-low", text="small"), Key(symbol="shade-high", text=f"large: {how.title}")
    return (Key(symbol="after", text=f"{how.title}, with its 95 % interval"),)


def _table(answer: AnalysisAnswer, rows: Sequence[Row]) -> Table:
    names = [name for name, value in rows[0].items() if _shows(value)]
    shown = tuple(tuple(_cell(name, row.get(name)) for name in names) for row in rows[:_MOST_ROWS])
    more = f" The first {_MOST_ROWS} of {len(rows)} rows." if len(rows) > _MOST_ROWS else ""
    caption = f"What `analyze {answer.analysis}` answered.{more}"
    return Table(caption=caption, columns=tuple(name.replace("_", " ") for name in names), rows=shown)


def _shows(value: Any) -> bool:
    if isinstance(value, dict):
        return "estimate" in value or "undefined" in value
    return not isinstance(value, list) or all(isinstance(item, int | float | str) for item in value)


def _cell(name: str, value: Any) -> Cell:
    if name == "language" and isinstance(value, str):
        return Language.of(value)
    match value:
        case {"estimate": estimate, "low": low, "high": high}:
            return Figure(f"{estimate:.4g} [{low:.4g}, {high:.4g}]")
        case {"undefined": reason}:
            return f"undefined: {reason}"
        case None:
            return ""
        case float() | int() if not isinstance(value, bool):
            return Figure(f"{value:.4g}" if isinstance(value, float) else str(value))
        case list():
            return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return str(value)
