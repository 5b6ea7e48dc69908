"""Human tables, rendered from artefacts with rich; the artefact is the source, never the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement as Width
from rich.table import Column, Table

from quant_fairness_plugin.artifacts import (
    ExportRecord,
    Frontier,
    Interval,
    LanguageDamage,
    Measurement,
    NecessityTest,
    Number,
    Precision,
    ProtectionPlan,
    ReaderRun,
    SweepReport,
    SweepRow,
    Synergy,
    SynergyMatrix,
    Undefined,
    Unit,
    precision_words,
)
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.recommend import describe_overrides

WIDTH_WITHOUT_TERMINAL = 180
LISTED_UNITS = 8
"""More of them are counted."""


def show(table: Table, *, keys: int = 1) -> None:
    """Print a table to stdout, wide enough for its columns where stdout is not a terminal.

    Args:
        table: what to print; on a terminal that it is too wide for, its columns come in several tables.
        keys: how many of the first columns name a row, and stand in each of these.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
        console.print(table)
        return
    parts = fitting(table, console, keys=keys)
    if table.title_justify == "left":  # a sentence, which a narrow table would break
        say(table.title)
        parts[0].title = None
    for part in parts:
        console.print(part)


def fitting(table: Table, console: Console, *, keys: int = 1) -> list[Table]:
    """Return a table as tables that fit a console; a column that is too wide by itself is left to wrap."""
    if table.expand:  # made for any width
        return [table]
    line, edge = (3, 1) if table.box else (2, -2 * (not table.pad_edge))
    widths = [line + _width(console, column) for column in table.columns]
    room = console.width - edge - sum(widths[:keys])
    groups: list[list[int]] = [[]]
    for index in range(keys, len(widths)):
        if groups[-1] and sum(widths[i] for i in groups[-1]) + widths[index] > room:
            groups.append([])
        groups[-1].append(index)
    if len(groups) == 1:
        return [table]
    parts = [_columns(table, [*range(keys), *group]) for group in groups]
    parts[0].title, parts[-1].caption = table.title, table.caption
    return parts


def _width(console: Console, column: Column) -> int:
    """Return the characters of a column's longest cell."""
    return max(Width.get(console, console.options, cell).maximum for cell in (column.header, *column.cells))


def _columns(table: Table, chosen: Sequence[int]) -> Table:
    """Return a table of some columns of another."""
    some = Table(box=table.box, pad_edge=table.pad_edge, title_justify=table.title_justify, show_lines=table.show_lines)
    kept = [table.columns[index] for index in chosen]
    for column in kept:
        some.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
    for row, cells in zip(table.rows, zip(*(column.cells for column in kept), strict=True), strict=True):
        some.add_row(*cells, style=row.style, end_section=row.end_section)
    return some


def number(value: Number, digits: int = 5) -> str:
    """Return `0.01230 [0.01000, 0.01500]`, or `undefined`."""
    if isinstance(value, Interval):
        return f"{value.estimate:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return "undefined"


def describe_part(measurement: Measurement) -> str:
    """`confirm part`, or `all sentences, not held out`: what a table of a measurement is about."""
    sentences = "all sentences" if measurement.part == "all" else f"{measurement.part} part"
    held_out = {True: "", False: ", not held out", None: ", not known to be held out"}[measurement.held_out]
    return sentences + held_out


def describe_original(measurement: Measurement, model: str) -> str:
    """`against demo (checksum as recorded)`: what a checkpoint was measured against, and how that is known."""
    known = "checksum as recorded" if measurement.original_compared else "checksum not compared"
    return f"against {model} ({known})"


def unit_list(units: Sequence[str]) -> str:
    """Return `0,9,11` or `3.down,5.qkv`, the forms that `--protect-layers` and `--protect-units` take."""
    return ",".join(Unit.parse(unit).short if Unit.is_name(unit) else unit for unit in units)


def layer_list(layers: Sequence[int]) -> str:
    """Return `0,9,11`, the form that `--protect-layers` takes."""
    return ",".join(map(str, layers))


def describe_columns(plan: ProtectionPlan) -> str:
    """Return `; 1% of input channels in 16 bit`, to follow what else a plan protects; empty if it protects none."""
    return f"; {100 * plan.protect_columns:.3g}% of input channels in 16 bit" if plan.protect_columns else ""


def singled_out(plan: ProtectionPlan) -> str:
    """Return `layers 0,9 in 16 bit; 3.down in 8 bit`: what a plan gives more; many units are counted, not listed."""
    layers = layer_list(plan.protected_layers)
    parts = [f"layers {layers} in 16 bit"] if layers else []
    kinds = Counter(plan.overrides.values())
    if len(plan.overrides) <= LISTED_UNITS:
        parts += filter(None, (describe_overrides(plan),))
    else:
        parts += [f"{count} units in {precision_words(kind)}" for kind, count in kinds.items()]
    return ("; ".join(parts) or "no protection") + describe_columns(plan)


def plan_list(plan: ProtectionPlan) -> str:
    """Return `0,9,11`, `3.down,5.qkv` or `0,3:int8`: what a plan singles out, layers in forward order."""
    precisions: dict[Unit, Precision] = {Unit(layer): "fp16" for layer in plan.protected_layers}
    precisions |= {Unit.parse(name): precision for name, precision in plan.overrides.items()}
    units = list(precisions)
    if all(unit.group is None for unit in units):
        units.sort(key=lambda unit: unit.layer)
    return ",".join(unit.short + ("" if precisions[unit] == "fp16" else f":{precisions[unit]}") for unit in units)


SIZES = {1: "single", 2: "pairs", 3: "triples"}


SHOWN = 4
"""Sets of one size, and synergies, in a table; a report holds them all."""


def sweep_table(report: SweepReport, objective: str) -> Table:
    """Return a table with one row a plan, in the order of the sweep: the objective and each language's KL per byte.

    Of sets of several units, and of single ones at other precisions than 16 bit, only the best are shown.
    """
    hidden = _hidden(report, objective)
    rows = [row for row in report.rows if row.plan not in hidden]
    table = _plan_table(report, rows, objective, title=f"{report.grid}: KL bits per byte by language")
    if hidden:
        table.caption = f"{len(hidden)} more plans are in --json"
    return table


def around_table(report: SweepReport, objective: str) -> Table:
    """Return the plans that also quantize what no checkpoint stores quantized."""
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
    """Return the plans of several units, or of single ones at other precisions, that are not among the best."""
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


def _value(figure: Number) -> float:
    return figure.estimate if isinstance(figure, Interval) else float("inf")


def _kl(damage: LanguageDamage) -> str:
    return f"{damage.kl_bits_per_byte.estimate:.4f}" if damage.status == "supported" else damage.status


def combination_lines(report: SweepReport, objective: str) -> list[str]:
    """Return how many plans of each size were evaluated, and the best set to protect of each size above one."""
    lines = []
    for size, count in report.combinations.items():
        part = "" if count.evaluated == count.possible else ", of the units that count most by themselves"
        best = _best(report, size, objective) if size > 1 else ""
        lines.append(f"{SIZES[size]}: {count.evaluated} of {count.possible} evaluated{part}{best}")
    if report.search is not None:
        search = report.search
        width = f", width {search.width}" if search.method == "beam" else ""
        lines.append(
            f"{search.method} search by {search.objective} for {search.size}{width}: {search.coverage.evaluated} of "
            f"{search.coverage.possible} sets evaluated{_best(report, search.size, search.objective)}"
        )
    return lines


def _best(report: SweepReport, size: int, objective: str) -> str:
    """Return the plan with the lowest objective among those that protect `size` units; empty where none is defined."""
    rows = [
        row
        for row in report.rows
        if row.mode == "protect-one" and len(row.units) == size and isinstance(row.objectives[objective], Interval)
    ]
    if not rows:
        return ""
    best = min(rows, key=lambda row: _value(row.objectives[objective]))
    return f"; best to protect: {unit_list(best.units)}, {number(best.objectives[objective])}"


def synergy_tables(report: SweepReport, objective: str) -> Iterator[Table]:
    """Yield the strongest synergies of each mode with pairs; by `worst` where sets have no `objective`."""
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
    """Say whether the best evaluated set of each size needs its members."""
    tests = [test for test in report.necessity if test.objective == objective]
    return [_necessity_line(test) for test in tests if test.changes]


def _necessity_line(test: NecessityTest) -> str:
    drops = [row for row in test.changes if " for " not in row.change]
    swaps = [row for row in test.changes if " for " in row.change]
    parts = [
        f"{what} clearly hurts for {sum(row.necessary for row in rows)} of {len(rows)}"
        for what, rows in (("dropping a member", drops), ("an exchange for another", swaps))
        if rows
    ]
    return f"{unit_list(test.units)}: {', '.join(parts)} ({len(test.changes)} of {test.possible} changes evaluated)"


def frontier_table(frontier: Frontier) -> Table:
    """Return the plans that nothing dominates, smallest first."""
    table = Table(
        "plan", "bytes", "worst KL", "mean KL", "on the frontier in",
        title=f"{len(frontier.plans)} of {len(frontier.rows)} evaluated plans are worth their bytes",
    )  # fmt: skip
    for row in frontier.rows:
        if row.on_frontier:
            sure = f"{row.on_frontier_probability:.0%} of resamples"
            table.add_row(row.plan, str(row.bytes_), number(row.worst), number(row.mean), sure)
    return table


def verified(run: ReaderRun | Undefined | None) -> str:
    """Say what was checked of a written folder, and which reader computed with it; or that none did, and why."""
    match run:
        case ReaderRun():
            return f"Verified: every file, tensor and value; and by {run}"
        case Undefined():
            return f"Verified: every file, tensor and value. No reader was run: {run.undefined}"
    return "Verified: every file, tensor and value. Which reader was run is not recorded"


def extent(record: ExportRecord) -> str:
    """Return how much of a model a checkpoint quantizes, and what stays in 16 bit against the plan, as a clause."""
    done, total = len(record.quantized_modules), record.linear_modules
    share = record.weight_bytes / record.sixteen_bit_bytes
    text = f"{done} of {total} linear modules quantized, weights {share:.0%} of 16 bit"
    if not record.kept_modules:
        return text
    name, reason = next(iter(record.kept_modules.items()))
    return f"{text}; {len(record.kept_modules)} stay in 16 bit, first {name}: {reason}"
