"""Bytes that a plan costs on disk, from weight shapes alone."""

from __future__ import annotations

from collections.abc import Iterable

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.grid_rules import group_count, misfit

SCALE_BYTES = 2  # scales are stored in the model's 16-bit type


def quantized_bytes(rows: int, cols: int, grid: Grid) -> int:
    """Bytes of one packed weight `[rows, cols]` with its scales, and zero points where the grid has them.

    A weight that the grid does not fit keeps 16 bit, as it does in the checkpoint.
    """
    if misfit(grid, rows, cols) is not None:
        return dense_bytes(rows, cols)
    groups = group_count(grid, cols)
    zero_points = 0 if grid.symmetric else rows * groups * grid.bits // 8
    return rows * cols * grid.bits // 8 + rows * groups * SCALE_BYTES + zero_points


def dense_bytes(rows: int, cols: int) -> int:
    """Bytes of one weight `[rows, cols]` in 16 bit."""
    return 2 * rows * cols


def plan_bytes(layer_bytes: dict[str, tuple[int, ...]], other: int, protected: Iterable[int]) -> int:
    """Bytes of the whole checkpoint's tensors when `protected` layers are 16 bit and all others quantized."""
    keep = set(protected)
    pairs = zip(layer_bytes["fp16"], layer_bytes["quantized"], strict=True)
    return other + sum(dense if layer in keep else packed for layer, (dense, packed) in enumerate(pairs))
