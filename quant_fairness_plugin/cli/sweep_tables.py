"""What a sweep found, in words and tables; rendered from the report, which holds all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from quant_fairness_plugin.artifacts import (
    Frontier,
    Interval,
    LanguageDamage,
    NecessityTest,
    Number,
    SweepReport,
    SweepRow,
    Synergy,
    SynergyMatrix,
)
from quant_fairness_plugin.cli.tables import number, unit_list

SIZES = {1: "single", 2: "pairs", 3: "triples"}
SHOWN = 4
"""Sets of one size, and synergies, in a table; a report holds them all."""


def sweep_table(report: SweepReport, objective: str) -> Table:
    """One row a plan, in the order of the sweep: the objective and each language's KL per byte.

    Of sets of several units, and of single ones at other precisions than 16 bit, only the best are shown.
    """
    hidden = _hidden(report, objective)
    rows = [row for row in report.rows if row.plan not in hidden]
    table = _plan_table(report, rows, objective, title=f"{report.grid}: KL bits per byte by language")
    if hidden:
        table.caption = f"{len(hidden)} more plans are in --json"
    return table


def around_table(report: SweepReport, objective: str) -> Table:
    """The plans that also quantize what no checkpoint stores quantized."""
    title = f"{report.grid}, simulation only (no checkpoint stores these quantized; they are not ranked)"
    return _plan_table(report, report.around, objective, title=title)


def _plan_table(report: SweepReport, rows: Sequence[SweepRow], objective: str, *, title: str) -> Table:
    languages = [name for name, status in report.languages.items() if status == "supported"]
    table = Table("plan", objective, *languages, title=title)
    for row in rows:
        by_language = {damage.language: damage for damage in row.damage}
        cells = [_kl(by_language[name]) for name in languages]
        table.add_row(row.plan, number(row.objectives[objective]), *cells)
    return table


def _hidden(report: SweepReport, objective: str) -> set[str]:
    """All but the best plans of several units, and of single ones that get neither 16 bit nor the grid's precision."""
    groups: dict[tuple[str | None, str | None, int], list[SweepRow]] = {}
    for row in report.rows:
        if len(row.units) > 1 or (row.mode == "protect-one" and row.precision != "fp16"):
            groups.setdefault((row.mode, row.precision, len(row.units)), []).append(row)
    largest = max(report.combine, 0 if report.search is None else report.search.size)
    hidden: set[str] = set()
    for (_, _, size), rows in groups.items():
        shown = SHOWN if size <= largest else 0
        hidden |= {row.plan for row in sorted(rows, key=lambda row: _value(row.objectives[objective]))[shown:]}
    return hidden


def _value(found: Number) -> float:
    return found.estimate if isinstance(found, Interval) else float("inf")


def _kl(damage: LanguageDamage) -> str:
    return f"{damage.kl_bits_per_byte.estimate:.4f}" if damage.status == "supported" else damage.status


def combination_lines(report: SweepReport, objective: str) -> list[str]:
    """How many plans of each size were evaluated, and the best set to protect of each size above one."""
    lines = []
    for size, count in report.combinations.items():
        chosen = "" if count.evaluated == count.possible else ", of the units that count most by themselves"
        found = _best(report, size, objective) if size > 1 else ""
        lines.append(f"{SIZES[size]}: {count.evaluated} of {count.possible} evaluated{chosen}{found}")
    if report.search is not None:
        search = report.search
        width = f", width {search.width}" if search.method == "beam" else ""
        lines.append(
            f"{search.method} search by {search.objective} for {search.size}{width}: {search.coverage.evaluated} of "
            f"{search.coverage.possible} sets evaluated{_best(report, search.size, search.objective)}"
        )
    return lines


def _best(report: SweepReport, size: int, objective: str) -> str:
    """The plan with the lowest objective among those that protect `size` units; empty where none is defined."""
    found = [
        row
        for row in report.rows
        if row.mode == "protect-one" and len(row.units) == size and isinstance(row.objectives[objective], Interval)
    ]
    if not found:
        return ""
    best = min(found, key=lambda row: _value(row.objectives[objective]))
    return f"; best to protect: {unit_list(best.units)}, {number(best.objectives[objective])}"


def synergy_tables(report: SweepReport, objective: str) -> Iterator[Table]:
    """The strongest synergies of each mode, where pairs were evaluated; by `worst` where sets have no `objective`."""
    for mode in report.modes:
        by = objective if f"{mode} {objective}" in report.interactions else "worst"
        matrix = report.interactions.get(f"{mode} {by}")
        if matrix is not None:
            yield _synergy_table(matrix, f"{mode}, {by}: strongest of {matrix.coverage}")


def _synergy_table(matrix: SynergyMatrix, title: str) -> Table:
    table = Table("pair", "additive synergy", "multiplicative", "adjusted p", title=title)
    for cell in sorted(matrix.pairs, key=_strength)[:SHOWN]:
        p = "" if cell.adjusted_p is None else f"{cell.adjusted_p:.3f}"
        table.add_row(unit_list(cell.pair), number(cell.additive), number(cell.multiplicative, 3), p)
    return table


def _strength(cell: Synergy) -> float:
    return -abs(cell.additive.estimate) if isinstance(cell.additive, Interval) else float("inf")


def necessity_lines(report: SweepReport, objective: str) -> list[str]:
    """Whether the best evaluated set of each size needs its members."""
    tests = [test for test in report.necessity if test.objective == objective]
    return [_necessity_line(test) for test in tests if test.changes]


def _necessity_line(test: NecessityTest) -> str:
    drops = [row for row in test.changes if " for " not in row.change]
    swaps = [row for row in test.changes if " for " in row.change]
    said = [
        f"{what} clearly hurts for {sum(row.necessary for row in rows)} of {len(rows)}"
        for what, rows in (("dropping a member", drops), ("an exchange for another", swaps))
        if rows
    ]
    return f"{unit_list(test.units)}: {', '.join(said)} ({len(test.changes)} of {test.possible} changes evaluated)"


def frontier_table(frontier: Frontier) -> Table:
    """The plans that nothing dominates, smallest first."""
    table = Table(
        "plan", "bytes", "worst KL", "mean KL", "on the frontier in",
        title=f"{len(frontier.plans)} of {len(frontier.rows)} evaluated plans are worth their bytes",
    )  # fmt: skip
    for row in frontier.rows:
        if row.on_frontier:
            sure = f"{row.on_frontier_probability:.0%} of resamples"
            table.add_row(row.plan, str(row.bytes_), number(row.worst), number(row.mean), sure)
    return table
