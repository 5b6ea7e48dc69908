"""GPTQ: choose the integers of a weight so that its *outputs* change least.

Takes a weight `[rows, cols]` and the second moment of its inputs `[cols, cols]`; returns the integers on their grid.
Written from Frantar et al., "GPTQ" (arXiv 2210.17323, Algorithm 1): columns are rounded one by one, and each one's
error is spread over the columns still to come, through the Cholesky factor of the inverse Hessian.

Order: columns with the largest Hessian diagonal first, where their errors can still be made up for (*act-order*). The
grid of every group is fixed from the original weight before the columns are permuted (*static*), so the result has
ordinary groups of neighbouring columns and needs no column index on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError, UnsolvableError
from quant_fairness_plugin.model.devices import wide_dtype
from quant_fairness_plugin.quantize.codes import codes_of
from quant_fairness_plugin.quantize.grid import Fitted, QuantizedTensor, fit
from quant_fairness_plugin.quantize.moments import GroupMoments, check_finite, working_dtype
from quant_fairness_plugin.quantize.refinement import refine

MAX_DAMP = 100.0
"""Past this the Hessian is all but a multiple of the identity: the solution is plain rounding."""


@dataclass(frozen=True, slots=True)
class GptqResult:
    """A solved weight and what the solution cost."""

    tensor: QuantizedTensor
    loss_relative_to_output_energy: float
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the squared output error over the squared output, on the calibration text."""
    damp_used: float
    """The damping at which the Hessian was positive definite; larger than wanted where it had to be raised."""


def solve_gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    scale_dtype: torch.dtype,
    damp: float,
    block: int = 128,
    act_order: bool = True,
    inputs: GroupMoments | None = None,
) -> GptqResult:
    """Quantize a weight against the second moment of its inputs.

    A column whose input never was anything but 0 on the calibration text is rounded to nearest, not set to 0: it may
    well carry a signal in text that the calibration lacks.

    Args:
        weight: float `[rows, cols]`, not changed.
        hessian: XᵀX `[cols, cols]` of the inputs in any scale, not changed.
        grid: the grid.
        scale_dtype: dtype in which scales will be stored.
        damp: share of the mean Hessian diagonal that is added to the diagonal.
        block: columns between two updates of the rest of the weight; changes the speed, not the solution.
        act_order: largest Hessian diagonal first, instead of left to right.
        inputs: per-language moments, for a grid with clip `minimax` only.

    Raises:
        ConfigError: an argument that cannot be used, a Hessian of another shape than the weight's columns, or clip
            `minimax` without inputs.
        ArtifactError: the weight holds NaN or infinity.
        UnsolvableError: the Hessian holds NaN or infinity, or no damping makes it positive definite.
    """
    _check(weight, hessian, damp=damp, block=block)
    fitted = fit(weight.float().contiguous(), grid, scale_dtype=scale_dtype, inputs=inputs)
    return solve_on_grid(weight, hessian, fitted, damp=damp, block=block, act_order=act_order)


def solve_on_grid(
    weight: Tensor, hessian: Tensor, fitted: Fitted, *, damp: float, block: int = 128, act_order: bool = True
) -> GptqResult:
    """Quantize a weight on a grid that is laid on it already; arguments and errors as of `solve_gptq`."""
    _check(weight, hessian, damp=damp, block=block)
    work = weight.to(working_dtype(weight.device, weight.shape[1]), copy=True)
    live = _without_dead(hessian, work.dtype)
    columns = torch.arange(work.shape[1], device=work.device)
    order = torch.argsort(live.diagonal(), descending=True, stable=True) if act_order else columns
    live = live.index_select(0, order).index_select(1, order)
    factor, damp_used = _inverse_factor(live, damp)
    del live
    group = order // (work.shape[1] // fitted.scales.shape[1])
    solved = _solve(work[:, order], factor, fitted, group.tolist(), block=block)
    integers = torch.empty_like(solved)
    integers[:, order] = solved
    tensor = fitted.coded(integers)
    return GptqResult(tensor, output_loss(weight, tensor.dequantize(), hessian), damp_used)


def refine_result(result: GptqResult, weight: Tensor, hessian: Tensor, *, damp: float, rounds: int) -> GptqResult:
    """Return a result whose scales and integers are solved again, each for the others; see `refine`.

    Args:
        result: of `solve_gptq`.
        weight: that it was solved for, float `[rows, cols]`.
        hessian: XᵀX `[cols, cols]`, as there.
        damp: share of the mean Hessian diagonal that is added to the diagonal.
        rounds: how often; 0 returns the result as it is.
    """
    if not rounds:
        return result
    # Faster than float64, and as exact as scales of 16 bit can be: unlike the factor of an inverse, nothing here is far
    # larger than what it is computed from.
    live = _without_dead(hessian, torch.float32)
    tensor = refine(result.tensor, weight, live, damp=damp, rounds=rounds)
    return GptqResult(tensor, output_loss(weight, tensor.dequantize(), hessian), result.damp_used)


def output_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of two weights `[rows, cols]`; 0 where the weight has no output at all."""
    energy = _energy(weight, hessian)
    return _energy(weight - quantized, hessian) / energy if energy > 0 else 0.0


def _energy(weight: Tensor, hessian: Tensor) -> float:
    return float(((weight @ hessian.to(weight.dtype)) * weight).sum(dtype=wide_dtype(weight.device)))


def _check(weight: Tensor, hessian: Tensor, *, damp: float, block: int) -> None:
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ConfigError(
            f"the Hessian has shape {tuple(hessian.shape)}; a weight of shape {tuple(weight.shape)} needs "
            f"{(weight.shape[1], weight.shape[1])}"
        )
    if not 0 < damp <= MAX_DAMP:
        raise ConfigError(f"damping {damp!r} cannot be used; use a number above 0 and up to {MAX_DAMP:g}, such as 0.05")
    if block < 1:
        raise ConfigError(f"block {block!r} cannot be used; use a number of columns, such as 128")
    check_finite(hessian)


def _without_dead(moment: Tensor, kind: torch.dtype) -> Tensor:
    """A copy in which dead columns (no input ever) stand alone, with the mean diagonal of the others."""
    live = moment.to(kind, copy=True)
    diagonal = live.diagonal()
    dead = diagonal <= 0
    live[dead, :] = 0
    live[:, dead] = 0
    diagonal[dead] = diagonal[~dead].mean() if bool((~dead).any()) else 1.0
    return live


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Hessian, and the damping that it took.

    A second moment is positive semidefinite by construction, but not in finite precision: where the factorization
    fails, damping grows tenfold.
    """
    mean = hessian.diagonal().mean()
    while damp <= MAX_DAMP:
        factor = hessian.clone()
        factor.diagonal().add_(damp * mean)
        # One name for all of them: what a step is made from goes when it is done.
        factor, failed = torch.linalg.cholesky_ex(factor)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed:
                return factor, damp
        damp *= 10
    raise UnsolvableError(
        f"the Hessian is not positive definite at any damping up to {MAX_DAMP:g}; "
        "give more calibration text, quantize with method 'rtn', or protect the layer"
    )


def _solve(work: Tensor, factor: Tensor, fitted: Fitted, groups: list[int], *, block: int) -> Tensor:
    """Codes `[rows, cols]` in the order of the columns of `work`."""
    # Columns are rows here, so that what one of them is computed from lies together.
    rest, steps, zeros = work.T.contiguous(), fitted.steps.T.to(work.dtype).contiguous(), fitted.zeros.T.contiguous()
    codes = codes_of(fitted.grid)
    lowest, highest = codes.limits(zeros.to(rest))
    integers = torch.empty(rest.shape, dtype=torch.uint8, device=work.device)
    for start in range(0, len(rest), block):
        stop = min(start + block, len(rest))
        part, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        for i in range(stop - start):
            group, pivot = groups[start + i], factor[start + i, start + i : stop]
            step, number = steps[group], part[i] / steps[group]
            codes.round_(number, lowest[group], highest[group])
            errors[i] = torch.addcmul(part[i], number, step, value=-1).div_(pivot[0])
            part[i + 1 :].addr_(pivot[1:], errors[i], alpha=-1)
            part[i] = number
        integers[start:stop] = codes.nearest(part, torch.stack([zeros[group] for group in groups[start:stop]]))
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return integers.T.contiguous()
