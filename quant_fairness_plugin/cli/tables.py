"""Human tables, rendered from artefacts with rich; the artefact is the source, never the table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from quant_fairness_plugin.artifacts import Interval, LanguageDamage, Measurement, Number, SweepReport, SweepRow

WIDTH_WITHOUT_TERMINAL = 180
SIZES = {1: "single", 2: "pairs", 3: "triples"}


def show(table: Table) -> None:
    """Print a table to stdout, wide enough for its columns where stdout is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    console.print(table)


def number(value: Number, digits: int = 5) -> str:
    """`0.01230 [0.01000, 0.01500]`, or `undefined`."""
    if isinstance(value, Interval):
        return f"{value.estimate:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return "undefined"


def damage_table(measurement: Measurement, *, title: str) -> Table:
    """One row a language: baseline BPB, ΔBPB, KL, excess, flips."""
    table = Table("language", "16-bit BPB", "ΔBPB", "KL bits/byte", "excess ΔBPB", "flips", "status", title=title)
    for row in measurement.languages:
        table.add_row(
            row.language,
            f"{row.baseline_bpb:.3f}",
            number(row.delta_bpb),
            number(row.kl_bits_per_byte),
            number(row.excess_bpb),
            f"{row.flip_rate.estimate:.1%}",
            row.status if not row.reason else f"{row.status}: {row.reason}",
        )
    return table


def comparison_table(unprotected: Measurement, protected: Measurement, *, title: str) -> Table:
    """Per language: the 16-bit model, then quantized without and with protection."""
    table = Table("language", "16-bit BPB", "ΔBPB, none", "ΔBPB, plan", "KL, none", "KL, plan", "status", title=title)
    for before, after in zip(unprotected.languages, protected.languages, strict=True):
        table.add_row(
            before.language,
            f"{before.baseline_bpb:.3f}",
            number(before.delta_bpb),
            number(after.delta_bpb),
            number(before.kl_bits_per_byte),
            number(after.kl_bits_per_byte),
            before.status,
        )
    table.add_section()
    for name, left, right in (
        ("worst KL", unprotected.worst_kl, protected.worst_kl),
        ("mean KL", unprotected.mean_kl, protected.mean_kl),
    ):
        table.add_row(name, "", "", "", number(left), number(right), "supported only")
    return table


def sweep_table(report: SweepReport, objective: str) -> Table:
    """One row a plan, in the order of the sweep: the objective and each language's KL per byte."""
    languages = [name for name, status in report.languages.items() if status == "supported"]
    table = Table("plan", objective, *languages, title=f"{report.grid}: KL bits per byte by language")
    for row in report.rows:
        by_language = {damage.language: damage for damage in row.damage}
        cells = [_kl(by_language[name]) for name in languages]
        table.add_row(row.plan, number(row.objectives[objective]), *cells)
    return table


def _kl(damage: LanguageDamage) -> str:
    return f"{damage.kl_bits_per_byte.estimate:.4f}" if damage.status == "supported" else damage.status


def combination_lines(report: SweepReport, objective: str) -> list[str]:
    """How many plans of each size were evaluated, and the best set to protect of each size above one."""
    lines = []
    for size, count in report.combinations.items():
        chosen = "" if count.evaluated == count.possible else ", of the units that count most by themselves"
        best = _best_to_protect(report, size, objective) if size > 1 else None
        found = (
            "" if best is None else f"; best to protect: {unit_list(best.units)}, {number(best.objectives[objective])}"
        )
        lines.append(f"{SIZES[size]}: {count.evaluated} of {count.possible} evaluated{chosen}{found}")
    return lines


def _best_to_protect(report: SweepReport, size: int, objective: str) -> SweepRow | None:
    """The plan with the lowest objective among those that protect `size` units; None where none is defined."""
    found: list[tuple[float, SweepRow]] = []
    for row in report.rows:
        value = row.objectives[objective]
        if row.mode == "protect-one" and len(row.units) == size and isinstance(value, Interval):
            found.append((value.estimate, row))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def unit_list(units: Sequence[str]) -> str:
    """`0,9,11` or `3.down,5.qkv`: the forms that `--protect-layers` and `--protect-units` take."""
    return ",".join(unit.removeprefix("layers.") for unit in units)


def layer_list(layers: Sequence[int]) -> str:
    """`0,9,11`: the form that `--protect-layers` takes."""
    return ",".join(map(str, layers))
