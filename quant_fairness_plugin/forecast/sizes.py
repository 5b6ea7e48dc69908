"""Bytes on disk of the checkpoint under a plan, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.sweep.sizes import LayerBytes, Shape, dense_bytes, plan_bytes, quantized_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes of the tensors of a checkpoint."""

    plan: int
    """With the protected layers in 16 bit, all others quantized."""
    quantized: int
    """All layers quantized."""
    sixteen_bit: int


def count_disk(outline: Outline, grid: Grid, protected: Sequence[int]) -> Disk:
    """The sizes under a plan that protects some layers."""
    table, other = byte_table(outline, grid)
    return Disk(
        plan=plan_bytes(table, other, protected),
        quantized=plan_bytes(table, other, ()),
        sixteen_bit=plan_bytes(table, other, range(outline.layers)),
    )


def byte_table(outline: Outline, grid: Grid) -> tuple[LayerBytes, int]:
    """Bytes of each layer in 16 bit and quantized, as in a sweep's report, and the bytes of everything else."""
    costs: dict[str, Callable[[Sequence[Shape]], int]] = {
        "fp16": dense_bytes,
        "quantized": partial(quantized_bytes, grid=grid),
    }
    table: LayerBytes = {
        kind: tuple(_layer(outline, i, cost) for i in range(outline.layers)) for kind, cost in costs.items()
    }
    return table, 2 * outline.parameters - sum(table["fp16"])


def _layer(outline: Outline, layer: int, cost: Callable[[Sequence[Shape]], int]) -> int:
    prefix = f"{outline.family.blocks}.{layer}."
    return sum(cost([outline.matrix(prefix + module) for module in unit.modules]) for unit in outline.family.units)
