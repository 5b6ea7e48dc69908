"""The plan among random plans and others of equal bytes."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import Evidence, EvidenceRow, Interval, Standing, Unit
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import Cell, Figure, number, size

_OURS, _RANDOM = "the plan", "random plans"
_WHY = (
    "Why random plans?",
    "Keeping any layer in 16 bit lowers the loss. The question is whether these layers do it better than as many bytes "
    "spent blindly: if the plan is not among the best of the random ones, the search was not worth its time.",
)


def controls_section(evidence: Evidence) -> Section | None:
    """Return the part; None where no plan has a figure."""
    rows = [row for row in evidence.rows if isinstance(row.worst, Interval)]
    if not rows:
        return None
    placed = [(_line(row), _role(row), row.worst.estimate) for row in _ordered(rows) if isinstance(row.worst, Interval)]
    return Section(
        name="controls",
        title="Is the plan better than chance?",
        level="researcher",
        lead=f"{_standing(evidence)} In detail: {evidence.verdict.rstrip('.')}.",
        picture=Picture.of(
            lambda width: charts.strip(placed, title="loss of the worst language, bits per byte", width=width),
            f"Loss of the worst language under the plan and under {len(placed) - 1} others. {_standing(evidence)}",
        ),
        keys=(
            Key(symbol="chosen", text="the plan; the dashed line continues it"),
            Key(symbol="tick", text="one random plan of equal bytes"),
            Key(symbol="plain", text="another way to choose"),
        ),
        table=_table(evidence),
        notes=(_WHY,),
    )


def _line(row: EvidenceRow) -> str:
    return _RANDOM if _role(row) == "random" else row.name


def _role(row: EvidenceRow) -> str:
    return "ours" if row.name == _OURS else "random" if row.name.startswith("random ") else "other"


def _ordered(rows: list[EvidenceRow]) -> list[EvidenceRow]:
    """Return the plan, the random ones, then the others."""
    return sorted(rows, key=lambda row: ("ours", "random", "other").index(_role(row)))


def _standing(evidence: Evidence) -> str:
    standing = evidence.standing
    if not isinstance(standing, Standing):
        return f"The place of the plan among random ones is undefined: {standing.undefined}."
    return (
        f"The plan is better than {standing.percentile:.0f} % of {standing.random_plans} random plans "
        f"(95 % interval {standing.low:.0f} to {standing.high:.0f} %, p = {standing.p_value:.3f})."
    )


def _table(evidence: Evidence) -> Table:
    outcomes = {row.control: row.outcome for row in evidence.comparisons}

    def cells(row: EvidenceRow) -> tuple[Cell, ...]:
        places = ", ".join(Unit.parse(n).short if Unit.is_name(n) else n for n in row.precisions) or "nothing"
        against = outcomes.get(row.name)
        return (
            row.name,
            places,
            Figure(size(row.bytes_)),
            number(row.worst),
            number(row.mean),
            against or "not compared",
        )

    columns = ("plan", "keeps wider", "size", "loss of the worst language", "mean loss", "against the plan")
    rows = tuple(cells(row) for row in _ordered(list(evidence.rows)))
    return Table(caption="Losses in bits per byte with 95 % intervals.", columns=columns, rows=rows)
