"""How fast this machine solves the matrices of a model: GPTQ on random ones, timed for a second or two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Effort, Grid
from quant_fairness_plugin.forecast.passes import Range
from quant_fairness_plugin.forecast.speed import counting, timed
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.quantize.grid_rules import unit_grid
from quant_fairness_plugin.quantize.methods.gptq import Gptq

FEW_ROWS, MANY_ROWS = 32, 256
MOST_COLUMNS = 1024
"""Wider matrices are timed at this width."""


@dataclass(frozen=True, slots=True)
class Solving:
    """Seconds that the solver takes, by the columns of a matrix."""

    matrix: Mapping[int, Range]
    """Of a matrix, however many rows it has: the inverse of its Hessian."""
    row: Mapping[int, Range]
    """Of each row."""

    def of(self, rows: int, columns: int) -> Range:
        """Return the seconds of one matrix."""
        return self.matrix[columns] + self.row[columns].times(rows)


def measure_solving(outline: Outline, grid: Grid, effort: Effort) -> Solving:
    """Time GPTQ at the widths of a model's matrices.

    Where a matrix is wider than what is timed, its inverse takes between the square and the cube of the width, and a
    row between the width and its square.

    Args:
        outline: the model's shapes.
        grid: what weights are rounded to, its clip included.
        effort: how much work GPTQ does.
    """
    names = (name for layer in range(outline.layers) for name in outline.family.full_names(layer))
    widths = {outline.matrix(name)[1] for name in names}
    method = Gptq().at(effort)
    with counting() as shared:
        timings = {width: _time(width, unit_grid(grid, (width,)), method) for width in sorted(widths)}
    return Solving(
        {width: one.times(shared.factor) for width, (one, _) in timings.items()},
        {width: row.times(shared.factor) for width, (_, row) in timings.items()},
    )


def _time(columns: int, grid: Grid, method: Gptq) -> tuple[Range, Range]:
    """Return the seconds of a matrix beside its rows, and of a row."""
    import torch

    from quant_fairness_plugin.quantize.compensation import compensated
    from quant_fairness_plugin.quantize.gptq import refine_result, solve_gptq

    size = 1 if grid.group_size == -1 else grid.group_size
    width = min(columns, max(size, MOST_COLUMNS // size * size))
    if width % size:  # a grid that does not fit: the matrix stays in 16 bit
        return Range(0.0, 0.0), Range(0.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    damp = method.damping(width, len(inputs))
    hessian, weight = inputs.T @ inputs, torch.randn(MANY_ROWS, width, generator=generator)

    def solve(rows: int) -> None:
        target = weight[:rows]
        if method.compensates:
            target = compensated(target, hessian, hessian, damp=damp)
        once = solve_gptq(target, hessian, grid, scale_dtype=torch.float16, damp=damp)
        refine_result(once, target, hessian, damp=damp, rounds=method.refinements)

    few, many = (timed(lambda rows=rows: solve(rows), repeats=2) for rows in (FEW_ROWS, MANY_ROWS))  # type: ignore[misc]
    row = max(0.0, many.low - few.low) / (MANY_ROWS - FEW_ROWS)
    alone = max(0.0, few.low - FEW_ROWS * row)
    spread, growth = max(few.high / few.low, many.high / many.low), columns / width
    return Range(alone * growth**2, spread * alone * growth**3), Range(row * growth, spread * row * growth**2)
