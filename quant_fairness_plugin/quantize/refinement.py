"""Improve a solution of GPTQ: the best scales for its integers, the best integers for these scales, and again.

GPTQ decides every integer once, before it knows what becomes of the columns to come. Here each is decided again, given
all others: cyclic coordinate descent, after Behdin et al., "QuantEase" (arXiv 2309.01885). Scales are solved by least
squares for integers that stay, after Zhang et al., "COMQ" (arXiv 2403.07134). No step makes the objective larger:
tr(ΔW H ΔWᵀ) with the damped Hessian of the calibration text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_fairness_plugin.quantize.codes import codes_of
from quant_fairness_plugin.quantize.grid import SMALLEST_SCALE, QuantizedTensor

SWEEPS = 2
"""Over all columns for the same scales."""
BLOCK = 64
"""Columns between two updates of the rest of the gradient; changes the speed, not the solution."""
SYSTEM_VALUES = 1 << 23
"""Of the equations for scales that are held at once, groups² for each row; changes the memory, not the solution."""
RIDGE = 1e-3
"""Share of a row's mean curvature that holds its scales where they were: a group may have no integer but its zero."""


def refine(tensor: QuantizedTensor, target: Tensor, hessian: Tensor, *, damp: float, rounds: int) -> QuantizedTensor:
    """Return integers and scales with a smaller output error, on the same grid.

    Scales that were chosen for the worst language (clip `minimax`) stay: least squares would choose for all together.
    So do scales of 8 bits, which have no values between theirs to choose.

    Args:
        tensor: where to start from.
        target: the weight to come close to, float `[rows, cols]`, not changed.
        hessian: XᵀX `[cols, cols]` of the inputs in any scale, in the dtype to work in, with no 0 on its diagonal; it
            is used up.
        damp: share of the mean Hessian diagonal that is added to the diagonal.
        rounds: how often scales and integers are solved.
    """
    curvature = hessian
    curvature.diagonal().add_(damp * hessian.diagonal().mean())
    wanted = target.to(curvature.dtype) @ curvature
    for _ in range(rounds):
        if tensor.grid.clip != "minimax" and tensor.scales.dtype in SMALLEST_SCALE:
            tensor = best_scales(tensor, wanted, curvature)
        tensor = best_integers(tensor, wanted, curvature)
    return tensor


def best_scales(tensor: QuantizedTensor, wanted: Tensor, curvature: Tensor) -> QuantizedTensor:
    """Return the same integers with each row's scales at the least error, in the dtype in which they are stored.

    A row keeps its scales where others are no better once they are rounded, or cannot be stored.

    Args:
        tensor: integers and scales.
        wanted: the weight to come close to times the curvature, `[rows, cols]`.
        curvature: positive definite `[cols, cols]`.
    """
    rows, groups = tensor.scales.shape
    size = max(1, SYSTEM_VALUES // groups**2)
    pieces = [slice(start, start + size) for start in range(0, rows, size)]
    scales = [_best_scales(_some_rows(tensor, piece), wanted[piece], curvature) for piece in pieces]
    return replace(tensor, scales=torch.cat(scales))


def _some_rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    return replace(tensor, integers=tensor.integers[rows], scales=tensor.scales[rows], zeros=tensor.zeros[rows])


def _best_scales(tensor: QuantizedTensor, wanted: Tensor, curvature: Tensor) -> Tensor:
    rows, groups = tensor.scales.shape
    codes = tensor.integers.view(rows, groups, -1)
    levels = codes_of(tensor.grid).numbers(codes, tensor.zeros.unsqueeze(2), wanted.dtype)
    system, size = levels.new_empty(rows, groups, groups), levels.shape[2]
    for group in range(groups):
        reach = levels[:, group] @ curvature[group * size : (group + 1) * size]
        system[:, group] = reach.view(rows, groups, size).mul_(levels).sum(2)
    right = levels.mul_(wanted.view(rows, groups, size)).sum(2)
    before = tensor.scales.to(wanted.dtype)
    hold = RIDGE * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    hold = torch.where(hold > 0, hold, 1.0)  # a row without any level: its scales do not matter
    solved = torch.linalg.solve(system + torch.diag_embed(hold.expand(rows, groups)), right + hold * before)
    kind = tensor.scales.dtype
    storable = (solved > SMALLEST_SCALE[kind]) & (solved < torch.finfo(kind).max)  # false of NaN
    found = torch.where(storable.all(1, keepdim=True), solved, before).to(kind)
    better = _error(system, right, found.to(wanted.dtype)) < _error(system, right, before)
    return torch.where(better.unsqueeze(1), found, tensor.scales)


def _error(system: Tensor, right: Tensor, scales: Tensor) -> Tensor:
    """The error of each row up to what no scale changes, `[rows]`."""
    return ((system @ scales.unsqueeze(2)).squeeze(2) - 2 * right).mul_(scales).sum(1)


def best_integers(tensor: QuantizedTensor, wanted: Tensor, curvature: Tensor) -> QuantizedTensor:
    """Return the same scales with integers that are each the best given all others of their row.

    Args:
        tensor: integers and scales.
        wanted: the weight to come close to times the curvature, `[rows, cols]`.
        curvature: positive definite `[cols, cols]`.
    """
    size = wanted.shape[1] // tensor.scales.shape[1]
    # Columns are rows here, so that what one of them is computed from lies together.
    steps, zeros = (
        part.to(wanted.dtype).T.contiguous().repeat_interleave(size, dim=0) for part in (tensor.steps, tensor.zeros)
    )
    codes, diagonal = codes_of(tensor.grid), curvature.diagonal().tolist()
    numbers = codes.numbers(tensor.integers.T.contiguous(), zeros, wanted.dtype)
    lowest, highest = codes.limits(zeros)
    values = numbers * steps
    columns = list(zip(numbers, values, steps, lowest, highest, diagonal, strict=True))
    slope = curvature @ values - wanted.T
    for _ in range(SWEEPS):
        moved = False
        for start in range(0, len(values), BLOCK):
            part = slice(start, min(start + BLOCK, len(values)))
            # The slope at a column until its turn comes, then how far it moves.
            moves, square = slope[part].clone(), curvature[part, part]
            for i, (number, value, step, low, high, own) in enumerate(columns[part]):
                # Of all numbers the nearest to the lowest point of a parabola is the best, however they are spaced.
                move = moves[i].mul_(-1 / own).add_(value).div_(step)
                codes.round_(move, low, high)
                number.copy_(move)
                move.mul_(step).sub_(value)
                moves[i + 1 :].addr_(square[i, i + 1 :], move)
            if moves.any():
                moved = True
                values[part] += moves
                slope.addmm_(curvature[:, part], moves)
        if not moved:
            break
    return replace(tensor, integers=codes.nearest(numbers, zeros).T.contiguous())
