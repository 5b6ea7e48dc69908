"""Solve one fusion group: integers, 16-bit channels and folded scales.

`stream` walks through the model, collects the moments of the inputs and hands a `Problem` to the method, which adds
what it computes to `Solved`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Unit
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.model.linear import set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.awq import solve_awq
from quant_fairness_plugin.quantize.columns import KeptColumns, Target, choose_columns, decoupled
from quant_fairness_plugin.quantize.compensation import compensated
from quant_fairness_plugin.quantize.folding import fold_source, model_folds, multiply_others
from quant_fairness_plugin.quantize.gptq import GptqResult, output_loss, refine_result, solve_on_grid
from quant_fairness_plugin.quantize.grid import QuantizedTensor, fit, quantize_rtn, shared_largest
from quant_fairness_plugin.quantize.grid_rules import has_columns
from quant_fairness_plugin.quantize.moments import MomentWatch

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What calibration says of the common inputs of a fusion group."""

    hessians: Mapping[str, Tensor]
    """Module → second moment `[cols, cols]`, as `fair_moments` weighs it."""
    magnitude: Tensor
    """`[cols]`: mean of the magnitude, mixed over languages."""
    groups: MomentWatch
    """Of the modules whose grid clips by language."""
    tokens: float | None
    """That the Hessians are the mean of; with different weights, as many as would tell as much if all counted the same.
    None for routed experts."""
    across: dict[str, Tensor] = field(default_factory=dict)
    """Module → how far its inputs are from those in the 16-bit model, `[cols, cols]`; empty where not compared, or
    used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fusion group to solve."""

    loaded: LoadedModel
    """The model; its block at hand holds what earlier groups left there."""
    unit: Unit
    weights: Mapping[str, Tensor]
    """Full module name → 16-bit weight `[rows, cols]`, not to be changed."""
    grids: Mapping[str, Grid]
    """Full module name → its grid."""
    columns: float
    """Share of the input channels of each module that keeps 16 bit."""
    measured: Inputs | None
    """None for a method without calibration."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which scales will be stored."""
        return self.loaded.storage_dtype

    @property
    def largest(self) -> float | None:
        """The largest magnitude in any of the weights, where these share what divides their scales."""
        return shared_largest(self.weights.values(), next(iter(self.grids.values())))

    @property
    def inputs(self) -> Inputs:
        """What calibration says, for methods that need it."""
        assert self.measured is not None, "`quantize_model` calibrates for every method that needs it"
        return self.measured


@dataclass(slots=True)
class Solved:
    """What a run has computed so far; the fields are those of `QuantizedModel`."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, KeptColumns] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    """Module that could not be solved, and so keeps 16 bit → reason."""
    targets: dict[str, Target] = field(default_factory=dict)
    """Of the modules of the block at hand that keep channels."""

    def keep(self, name: str, target: Target) -> None:
        """Note what a solved module lacks in the channels that it keeps."""
        self.targets[name], self.columns[name] = target, target.columns(self.tensors[name])

    def dense(self, name: str) -> Tensor:
        """Return what a solved module computes with, float32 `[rows, cols]`."""
        return dense_values(self.tensors[name], self.columns.get(name))


def dense_values(tensor: QuantizedTensor, columns: KeptColumns | None) -> Tensor:
    """Return the weight that integers and 16-bit channels stand for together, float32 `[rows, cols]`."""
    weight = tensor.dequantize()
    return weight if columns is None else columns.added_to(weight)


def solve_rtn_unit(problem: Problem, solved: Solved) -> None:
    """Round the modules of a fusion group to nearest."""
    largest = problem.largest
    for name, weight in problem.weights.items():
        with error_prefix(name):
            solved.tensors[name] = quantize_rtn(
                weight, problem.grids[name], scale_dtype=problem.scale_dtype, largest=largest
            )


def shrink(hessians: Mapping[str, Tensor], share: float) -> None:
    """Take a share off what Hessians `[cols, cols]` say of two different channels; each channel's own stays."""
    apart = {id(hessian): hessian for hessian in hessians.values()}  # modules may share one
    for hessian in apart.values() if share else ():
        own = hessian.diagonal().clone()
        hessian.mul_(1 - share).diagonal().copy_(own)


def compensating(problem: Problem, *, damp: float) -> Problem:
    """Return the problem of making up for what modules in front have lost; the same where inputs were not compared."""
    targets = dict(problem.weights)
    for name in list(problem.inputs.across):
        with error_prefix(name):
            hessian, across = problem.inputs.hessians[name], problem.inputs.across.pop(name)
            targets[name] = compensated(targets[name].float(), hessian, across, damp=damp)
    return replace(problem, weights=targets)


def solve_gptq_unit(problem: Problem, solved: Solved, *, damp: float, act_order: bool, refinements: int) -> None:
    """Solve a fusion group with GPTQ; twice where channels stay in 16 bit, because the first solution says which.

    Args:
        problem: the group, whose weights are what the modules are to compute.
        solved: gets its integers, losses and damping.
        damp: share of the mean Hessian diagonal that is added to the diagonal.
        act_order: largest Hessian diagonal first.
        refinements: how often scales and integers are solved again.
    """
    gptq = partial(_gptq, problem, damp=damp, act_order=act_order, refinements=refinements)
    hessians, weights = problem.inputs.hessians, problem.weights
    results = gptq(hessians)
    errors = {name: result.tensor.dequantize() - weights[name].float() for name, result in results.items()}
    index = _columns_in_16_bit(problem, errors)
    if index is not None:
        apart = {name: decoupled(hessian, index) for name, hessian in hessians.items()}
        results = gptq(apart)
    for name, result in results.items():
        if result.damp_used > damp:
            _logger.warning("%s: damping raised from %g to %g", name, damp, result.damp_used)
        solved.tensors[name], solved.damping[name] = result.tensor, result.damp_used
        solved.losses[name] = result.loss_relative_to_output_energy
        if index is not None:
            wide = weights[name].float()
            solved.keep(name, Target(wide.clone(), index))
            solved.losses[name] = output_loss(wide, solved.dense(name), hessians[name])


def _gptq(
    problem: Problem, hessians: Mapping[str, Tensor], *, damp: float, act_order: bool, refinements: int
) -> dict[str, GptqResult]:
    results: dict[str, GptqResult] = {}
    largest = problem.largest
    for name, hessian in hessians.items():
        with error_prefix(name):
            weight = problem.weights[name].float()
            fitted = fit(
                weight.contiguous(),
                problem.grids[name],
                scale_dtype=problem.scale_dtype,
                inputs=problem.inputs.groups.inputs(name),
                largest=largest,
            )
            once = solve_on_grid(weight, hessian, fitted, damp=damp, act_order=act_order)
            results[name] = refine_result(once, weight, hessian, damp=once.damp_used, rounds=refinements)
    return results


def _columns_in_16_bit(problem: Problem, errors: Mapping[str, Tensor], *, scale: Tensor | None = None) -> Tensor | None:
    """Return the channels that the fusion group keeps in 16 bit; None if none."""
    if not has_columns(problem.grids[next(iter(errors))], problem.columns):
        return None
    return choose_columns(errors, problem.inputs.hessians, problem.columns, scale=scale)


def solve_awq_unit(problem: Problem, solved: Solved) -> None:
    """Solve a fusion group with AWQ and fold its scale; a source that is quantized already gets other scales."""
    loaded, unit, weights, hessians = problem.loaded, problem.unit, problem.weights, problem.inputs.hessians
    names = tuple(weights)
    fold = model_folds(loaded, unit.layer).get(unit.group or "")
    source = None if fold is None else fold_source(loaded, unit.layer, fold, solved.tensors)
    with error_prefix(names[0]):
        results, scale = solve_awq(
            weights,
            hessians,
            problem.inputs.magnitude,
            problem.grids,
            scale_dtype=problem.scale_dtype,
            effective=None if source is None else source.effective,
            # The products of q and k magnify what is clipped in either.
            clipped=names if unit.group != "qkv" else names[2:],
        )
    scaled = {name: weight.float() * scale for name, weight in weights.items()}
    errors = {name: result.tensor.dequantize() - scaled[name] for name, result in results.items()}
    index = _columns_in_16_bit(problem, errors, scale=scale)
    for name, result in results.items():
        solved.tensors[name], solved.losses[name] = result.tensor, result.loss_relative_to_output_energy
        solved.folded.pop(f"{name}.weight", None)  # of another group's fold; the integers hold it now
        if index is not None:
            solved.keep(name, Target(scaled[name], index))
            solved.losses[name] = output_loss(weights[name].float(), solved.dense(name) / scale, hessians[name])
    if source is None or fold is None:
        return
    folded = source.fold(scale)
    solved.folded |= folded.parameters | multiply_others(loaded, unit.layer, fold, scale)
    if folded.tensor is not None:
        solved.tensors[source.name] = folded.tensor
    if source.name in solved.targets:
        solved.keep(source.name, solved.targets[source.name].divided(source.by_row(scale)))
        set_linear_weight(source.module, solved.dense(source.name))


@contextmanager
def error_prefix(name: str) -> Iterator[None]:
    """Put the module's name in front of an error's message."""
    try:
        yield
    except QuantFairnessError as err:
        raise type(err)(f"{name}: {err}") from err
