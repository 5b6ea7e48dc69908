"""Human tables, rendered from artefacts with rich; the artefact is the source, never the table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from quant_fairness_plugin.artifacts import Interval, Measurement, Number, Precision, ProtectionPlan

WIDTH_WITHOUT_TERMINAL = 180


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


def unit_list(units: Sequence[str]) -> str:
    """`0,9,11` or `3.down,5.qkv`: the forms that `--protect-layers` and `--protect-units` take."""
    return ",".join(unit.removeprefix("layers.") for unit in units)


def layer_list(layers: Sequence[int]) -> str:
    """`0,9,11`: the form that `--protect-layers` takes."""
    return ",".join(map(str, layers))


def describe_columns(plan: ProtectionPlan) -> str:
    """`; 1% of input channels in 16 bit`, to follow what a plan keeps besides; empty if it keeps none."""
    return f"; {100 * plan.protect_columns:.3g}% of input channels in 16 bit" if plan.protect_columns else ""


def plan_list(plan: ProtectionPlan) -> str:
    """`0,9,11`, `3.down,5.qkv` or `0,3:int8`: what a plan singles out, layers in forward order; empty if nothing."""
    chosen: dict[str, Precision] = {f"layers.{layer}": "fp16" for layer in plan.protected_layers}
    chosen |= plan.overrides
    names = list(chosen)
    if all(name.count(".") == 1 for name in names):
        names.sort(key=list(plan.units).index)
    return ",".join(unit_list([name]) + ("" if chosen[name] == "fp16" else f":{chosen[name]}") for name in names)
