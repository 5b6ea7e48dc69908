"""What bytes buy: every evaluated plan by its size, its worst and its mean harm."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import Evidence, Frontier, FrontierRow, Interval, ProtectionPlan, SweepReport
from quant_fairness_plugin.recommend.frontier import frontier_of
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.compared import evaluated_row, size_of
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import Cell, Figure, decimals, number, size

_ROLES = ("a plan", "worth its bytes", "recommended")
_FRONTIER = (
    "When is a plan worth its bytes?",
    "When no other evaluated plan is at least as good in all of size, harm to the worst language and mean harm, and "
    "better in one of them. The last column says in how many resamples of the sentences that stays true.",
)


def sweep_tradeoff(sweep: SweepReport, plan: ProtectionPlan | None) -> Section | None:
    """Return the part for the plans of a sweep; None where no plan has both bytes and harms."""
    row = None if plan is None else evaluated_row(sweep, plan)
    chosen = None if row is None else row.plan
    total = None if plan is None or row is not None else size_of(sweep, plan)
    rule = None if total is None else total / 1e6
    condition = "Forecast by rounding in memory, on the sentences that the plan is chosen by."
    return _section(frontier_of(sweep), chosen, rule, condition)


def evidence_tradeoff(evidence: Evidence) -> Section | None:
    """Return the part for the plans of an evaluation on the confirm part; None where none has both harms."""
    held_out = "Evaluated on sentences that nothing was selected on."
    return _section(evidence.frontier, "the plan", None, evidence.condition or held_out)


def _section(frontier: Frontier, chosen: str | None, rule: float | None, condition: str) -> Section | None:
    known = [row for row in frontier.rows if isinstance(row.worst, Interval) and isinstance(row.mean, Interval)]
    if not known:
        return None
    keys = [Key(symbol="plain", text=_ROLES[0]), Key(symbol="square", text="a plan that is worth its bytes")]
    if chosen is not None:
        keys.append(Key(symbol="chosen", text="the recommended plan"))
    if rule is not None:
        keys.append(Key(symbol="dashed-chosen", text="size of the recommended plan, which was not itself evaluated"))
    worth = sum(row.on_frontier for row in known)
    text = f"{worth} of {len(known)} evaluated plans are worth their bytes. {_recommended(known, chosen, rule)}"
    return Section(
        name="tradeoff",
        title="What more bytes would buy",
        level="practitioner",
        lead=f"{text} {condition}",
        picture=Picture.of(
            lambda width: charts.points(_panels(known, chosen), roles=_ROLES, rule=rule, width=width), text
        ),
        keys=tuple(keys),
        table=_table(known, chosen),
        notes=(_FRONTIER,),
    )


def _recommended(rows: list[FrontierRow], chosen: str | None, rule: float | None) -> str:
    row = next((row for row in rows if row.plan == chosen), None)
    if row is not None:
        return f"The recommended one takes {size(row.bytes_)} and harms the worst language by {_value(row.worst)}."
    return "" if rule is None else f"The recommended one takes {size(1e6 * rule)}; it is a sum of evaluated ones."


def _panels(rows: list[FrontierRow], chosen: str | None) -> list[tuple[str, list[charts.Point]]]:
    def role(row: FrontierRow) -> str:
        return _ROLES[2] if row.plan == chosen else _ROLES[1] if row.on_frontier else _ROLES[0]

    def point(row: FrontierRow, harm: object) -> charts.Point:
        assert isinstance(harm, Interval)
        return charts.Point(label=row.plan, role=role(row), megabytes=row.bytes_ / 1e6, harm=harm.estimate)

    return [
        ("loss of the worst language", [point(row, row.worst) for row in rows]),
        ("mean loss", [point(row, row.mean) for row in rows]),
    ]


def _table(rows: list[FrontierRow], chosen: str | None) -> Table:
    def cells(row: FrontierRow) -> tuple[Cell, ...]:
        name = f"{row.plan} (recommended)" if row.plan == chosen else row.plan
        sure = row.on_frontier_probability
        worth = Figure(f"{'yes' if row.on_frontier else 'no'}, in {sure:.0%}") if sure is not None else "unknown"
        return name, Figure(size(row.bytes_)), number(row.worst), number(row.mean), worth

    columns = ("plan", "size", "loss of the worst language", "mean loss", "worth its bytes")
    caption = "Losses in bits per byte with 95 % intervals, the smallest plan first."
    return Table(caption=caption, columns=columns, rows=tuple(cells(row) for row in rows))


def _value(value: object) -> str:
    return decimals(value.estimate) if isinstance(value, Interval) else "an unknown amount"
