"""Which layer matters for which language: the map of a sweep."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import LanguageDamage, Ranking, SweepReport, SweepRow, Unit
from quant_fairness_plugin.plans.plan_set import NONE
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table, shade
from quant_fairness_plugin.report.words import Cell, Figure, Language

_MOST_ROWS = 60
"""Beyond so many units only those with the largest figures are drawn; the table has all."""
_READING = (
    "How is the map read?",
    "Each row is one evaluated plan that treats a single unit apart from all others. Figures are thousandths of a bit "
    "per byte and have no interval here; whether the order of the units can be trusted is said above. Effects of "
    "several units do not add up exactly.",
)


def layers_section(sweep: SweepReport) -> Section | None:
    """Return the map of units and languages; None where no unit was singled out or no language is supported."""
    rows = _single_rows(sweep)
    languages = [name for name, status in sweep.languages.items() if status == "supported"]
    if not rows or not languages:
        return None
    protects = sweep.modes[0] == "protect-one"
    none = _by_language(next(row for row in sweep.rows if row.plan == NONE)) if protects else {}
    effects = {row.units[0]: _effects(row, none, languages) for row in rows}
    shown = sorted(effects, key=lambda unit: -max(effects[unit]))[:_MOST_ROWS]
    drawn = {unit: values for unit, values in effects.items() if unit in shown}
    return Section(
        name="layers",
        title="Which layer matters for which language",
        level="researcher",
        lead=_lead(sweep, effects, languages, protects=protects),
        picture=Picture.of(lambda width: _chart(drawn, languages, width), _text(effects, languages, protects=protects)),
        keys=(
            Key(symbol="shade-low", text="little effect, or the wrong way"),
            Key(symbol="shade-high", text="the largest effect; figures in thousandths of a bit per byte"),
        ),
        table=_table(effects, languages, protects=protects),
        notes=(_READING,),
    )


def _single_rows(sweep: SweepReport) -> list[SweepRow]:
    units = set(sweep.units) if sweep.modes else set()
    first = [row for row in sweep.rows if sweep.modes and row.mode == sweep.modes[0] and len(row.units) == 1]
    kinds = {row.precision for row in first}
    kind = "fp16" if "fp16" in kinds else next(iter(sorted(filter(None, kinds))), None)
    return [row for row in first if row.precision == kind and row.units[0] in units and Unit.is_name(row.units[0])]


def _by_language(row: SweepRow) -> dict[str, LanguageDamage]:
    return {damage.language: damage for damage in row.damage}


def _effects(row: SweepRow, none: dict[str, LanguageDamage], languages: list[str]) -> list[float]:
    """Return in thousandths what protecting a unit saves; what quantizing it alone costs, without `none`."""
    damages = {language: damage.kl_bits_per_byte.estimate for language, damage in _by_language(row).items()}
    return [
        1000 * (none[name].kl_bits_per_byte.estimate - damages[name] if none else damages[name]) for name in languages
    ]


def _chart(effects: dict[str, list[float]], languages: list[str], width: int) -> object:
    most = max(max(values) for values in effects.values())
    columns = [Language.of(name).label for name in languages]
    cells = [
        charts.Tile(
            row=Unit.parse(unit).short,
            column=column,
            shade=shade(value, most, charts.CLASSES),
            text=_thousandths(value),
        )
        for unit, values in effects.items()
        for column, value in zip(columns, values, strict=True)
    ]
    return charts.tiles(cells, columns=columns, width=width)


def _thousandths(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.5 else f"{value:.1f}" if abs(value) >= 0.05 else f"{value:.2f}"


def _what(*, protects: bool) -> str:
    return "What keeping it in 16 bit saves" if protects else "What quantizing it alone costs"


def _lead(sweep: SweepReport, effects: dict[str, list[float]], languages: list[str], *, protects: bool) -> str:
    best = {
        name: max(effects, key=lambda unit, i=i: effects[unit][i])  # type: ignore[misc] # i is bound on purpose
        for i, name in enumerate(languages)
    }
    places = dict.fromkeys(Unit.parse(unit).short for unit in best.values())
    said = f"{_what(protects=protects)} is largest at {', '.join(places)}."
    ranking = sweep.rankings.get(f"{sweep.modes[0]} worst")
    if not isinstance(ranking, Ranking):
        return said
    trust = "can be trusted" if ranking.stable else "cannot be trusted on so few sentences"
    return f"{said} The order of the units by the worst language {trust}: {ranking.reason}."


def _text(effects: dict[str, list[float]], languages: list[str], *, protects: bool) -> str:
    unit, values = max(effects.items(), key=lambda item: max(item[1]))
    name = Language.of(languages[values.index(max(values))]).name
    where = (
        f"the largest figure is {max(values):.1f} thousandths of a bit per byte, at {Unit.parse(unit).short} in {name}"
    )
    return f"Map of {len(effects)} units and {len(languages)} languages. {_what(protects=protects)}; {where}."


def _table(effects: dict[str, list[float]], languages: list[str], *, protects: bool) -> Table:
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (Unit.parse(unit).short, *(Figure(_thousandths(value)) for value in values)) for unit, values in effects.items()
    )
    columns = ("unit", *(Language.of(name).label for name in languages))
    caption = f"{_what(protects=protects)}, in thousandths of a bit per byte."
    return Table(caption=caption, columns=columns, rows=rows)
