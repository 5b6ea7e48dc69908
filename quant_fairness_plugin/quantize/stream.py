"""Quantize a model block by block: takes a `LoadedModel` and a plan, returns a `QuantizedModel`.

With calibration, every module is solved on the inputs that it will get in the quantized model: those that come out of
the quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian.
AWQ folds each group's input scale into the module in front of it, which may be quantized by then: its integers stay and
its scales are divided.
Protected layers run in 16 bit and are left alone. At any time at most one block differs from the model passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import ExpertCoverage, Grid, ProtectionPlan, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.model.experts import Experts
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.blocks import Batch, first_inputs
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.expert_rules import check_experts
from quant_fairness_plugin.quantize.experts import expert_stages, routed_rows
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.methods import check_method_grid, find_method, method_names
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.moments import FairMagnitude, MomentWatch, fair_moments, language_moments
from quant_fairness_plugin.quantize.selection import Selection, select_modules
from quant_fairness_plugin.quantize.solving import Inputs, Problem, Solved, dense_values, error_prefix

BATCH_TOKENS = 2048
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model and the integers that replace some of its weights. The model object itself still is in 16 bit."""

    loaded: LoadedModel
    plan: ProtectionPlan
    """What it was made by."""
    method: str
    """A name of `methods.METHODS`."""
    tensors: dict[str, QuantizedTensor]
    """Full module name → integers, each with its grid (an INT8 unit has other bits than the plan's grid)."""
    folded: dict[str, Tensor]
    """AWQ: full parameter name (`….input_layernorm.weight`, `….v_proj.bias`) → 16-bit value that replaces the model's,
    as the module stores it, float32 with values of the storage dtype; empty otherwise."""
    kept: dict[str, str]
    """Module of a quantized layer that stays in 16 bit → reason."""
    losses: dict[str, float]
    """GPTQ, AWQ: module → squared output error over squared output on the calibration text; empty for RTN."""
    damping: dict[str, float]
    """GPTQ: module → damping used; empty for the others."""
    calibration: CalibrationSet | None
    backend: str = "native"
    """Who made the integers: our own core, or the name of a backend."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the backend's packages; empty for our own core."""
    columns: Mapping[str, KeptColumns] = field(default_factory=dict)
    """Full module name → the input channels that keep 16 bit beside its integers."""
    experts: ExpertCoverage | None = None
    """Of a mixture of experts: how calibration reached them, where that was counted."""

    @property
    def grid(self) -> Grid:
        """The grid of everything that the plan does not single out."""
        return self.plan.grid

    def dense_weight(self, name: str) -> Tensor:
        """Return what a quantized module computes with, 16-bit channels included: float32 `[rows, cols]`."""
        return dense_values(self.tensors[name], self.columns.get(name))

    def dense_weights(self) -> dict[str, Tensor]:
        """Return everything that `exchange.swapped` needs to compute the quantized model.

        Full module name → dequantized weight as the module stores it, and full parameter name → folded value, in the
        parameter's dtype and device.
        """
        modules = {
            name: module for layer in range(self.loaded.layers) for name, module in self.loaded.linears(layer).items()
        }
        dense = {name: stored_form(modules[name], self.dense_weight(name)) for name in self.tensors}
        return dense | {name: value.to(self.loaded.model.get_parameter(name)) for name, value in self.folded.items()}


@dataclass(frozen=True, slots=True)
class _Work:
    """What stays the same from the first block to the last."""

    loaded: LoadedModel
    method: Method
    selection: Selection
    columns: float
    report: Report

    def units(self, layer: int) -> Iterator[tuple[Unit, dict[str, nn.Module]]]:
        """Yield the fusion groups to quantize in a layer, in forward order, with their modules by full name."""
        modules = self.loaded.linears(layer)
        family = self.loaded.family
        names = {f"{family.blocks}.{layer}.{unit.modules[0]}": unit.name for unit in family.units_of(layer)}
        for group in self.selection.units.get(layer, ()):
            yield Unit(layer, names[group[0]]), {name: modules[name] for name in group}

    def routed(self, unit: Unit) -> bool:
        """Return whether a unit is that of a layer's routed experts."""
        return any(group.routed and group.name == unit.group for group in self.loaded.family.units_of(unit.layer))

    def solve(self, unit: Unit, weights: Mapping[str, Tensor], measured: Inputs | None, solved: Solved) -> None:
        """Hand a fusion group to the method."""
        problem = Problem(
            loaded=self.loaded, unit=unit, weights=weights, grids=self.selection.grids, columns=self.columns,
            measured=measured,
        )  # fmt: skip
        self.method.solve(problem, solved)


def quantize_model(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    *,
    method: str | Method,
    calibration: CalibrationSet | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Report | None = None,
) -> QuantizedModel:
    """Quantize the linear modules of all layers that a plan does not protect.

    The model is bit-identical afterwards, also when an error or an interrupt ends the work.

    Args:
        loaded: the model; changed one block at a time while the work lasts.
        plan: which layers and units keep which precision, the grid of the others, and the share of input channels that
            keep 16 bit. Modules that their grid does not fit stay in 16 bit and are listed in `kept`.
        method: a name of `methods.METHODS`, or a method with other options, such as `Gptq(damp=0.1)`.
        calibration: token rows and language weights; None for a method that needs none.
        batch_tokens: most calibration tokens that are run at once.
        progress: called with (layers done, layers) after each layer.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, a plan of another model, a grid
            that fits no module, or one that the method cannot be used with.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: a module cannot be solved (names it), or the method does not know the architecture.
    """
    solver = find_method(method) if isinstance(method, str) else method
    selection = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    if plan.layers != loaded.layers:
        raise ConfigError(
            f"the plan is for {plan.layers} layers, and the model has {loaded.layers}; use a plan of this model"
        )
    _check(solver, plan, selection, calibration)
    if any(group.routed for layer in range(loaded.layers) for group in loaded.family.units_of(layer)):
        check_experts(solver.name, plan.grid, columns=plan.protect_columns)
    solver.check_model(loaded)
    work = _Work(loaded, solver, selection, plan.protect_columns, progress or (lambda done, total: None))
    if calibration is None:
        solved = _solve_from_weights(work)
    else:
        solved = _solve_on_inputs(work, calibration, batch_tokens=batch_tokens)
    return QuantizedModel(
        loaded=loaded, plan=plan, method=solver.name, tensors=solved.tensors, folded=solved.folded,
        kept=selection.kept, losses=solved.losses, damping=solved.damping, calibration=calibration,
        columns=solved.columns,
    )  # fmt: skip


def _check(method: Method, plan: ProtectionPlan, selection: Selection, calibration: CalibrationSet | None) -> None:
    """Refuse a method for a plan and a calibration that do not go with it."""
    if method.needs_calibration and calibration is None:
        raise ConfigError(
            f"method {method.name!r} needs calibration text and got none; pass build_calibration(…), or use "
            f"{method_names(lambda other: not other.needs_calibration)}"
        )
    if calibration is not None and not method.needs_calibration:
        raise ConfigError(
            f"method {method.name!r} uses no calibration text but got some; pass None, or use "
            f"{method_names(lambda other: other.needs_calibration)}"
        )
    if plan.protect_columns and not method.keeps_columns:
        raise ConfigError(
            f"columns {plan.protect_columns} cannot be used with method {method.name!r}: which channels matter only "
            f"calibration tells; use {method_names(lambda other: other.keeps_columns)}"
        )
    for grid in dict.fromkeys(selection.grids.values()):
        check_method_grid(method, grid)


@torch.no_grad()
def _solve_from_weights(work: _Work) -> Solved:
    """Solve by a method without calibration, for which the model is not run."""
    solved = Solved()
    for layer in range(work.loaded.layers):
        for unit, modules in work.units(layer):
            weights = {name: linear_weight(module) for name, module in modules.items()}
            work.solve(unit, weights, None, solved)
        work.report(layer + 1, work.loaded.layers)
    return solved


def _solve_on_inputs(work: _Work, calibration: CalibrationSet, *, batch_tokens: int) -> Solved:
    """Solve by a method with calibration, block after block as the rows reach it."""
    loaded, solved = work.loaded, Solved()
    last = max(work.selection.units)
    with _evaluating(loaded.model):
        batches = first_inputs(loaded, calibration, batch_tokens=batch_tokens)
        for layer in range(loaded.layers):
            with _restored(loaded, layer):
                solved.targets.clear()
                for unit, modules in work.units(layer):
                    solve = _solve_experts if work.routed(unit) else _solve_unit
                    solve(work, unit, modules, batches, calibration, solved)
                if layer < last:  # what follows the last quantized layer needs no inputs
                    _advance(loaded, layer, batches)
            work.report(layer + 1, loaded.layers)
    return solved


@torch.no_grad()
def _solve_unit(
    work: _Work,
    unit: Unit,
    modules: Mapping[str, nn.Module],
    batches: list[Batch],
    calibration: CalibrationSet,
    solved: Solved,
) -> None:
    """Solve the modules of one fusion group and leave their dequantized weights in the block."""
    weights = {name: linear_weight(module) for name, module in modules.items()}
    first, module = next(iter(modules.items()))
    magnitude, groups = FairMagnitude(calibration.shares), MomentWatch(weights, work.selection.grids)
    with error_prefix(first):
        moments = language_moments(work.loaded.block(unit.layer), module, unit.layer, batches, calibration)
        hessians = fair_moments(groups.watch(magnitude.watch(moments)), weights, calibration.shares)
    work.solve(unit, weights, Inputs(hessians=hessians, magnitude=magnitude.value, groups=groups), solved)
    for name in modules:
        set_linear_weight(modules[name], solved.dense(name))


@torch.no_grad()
def _solve_experts(
    work: _Work,
    unit: Unit,
    modules: Mapping[str, nn.Module],
    batches: list[Batch],
    calibration: CalibrationSet,
    solved: Solved,
) -> None:
    """Solve the routed experts of a layer one by one and leave their dequantized weights in the block."""
    prefix = next(iter(modules)).rsplit(".", 2)[0]
    experts = work.loaded.model.get_submodule(prefix)
    assert isinstance(experts, Experts), "a routed unit is that of unfolded experts"
    with error_prefix(prefix):
        rows = routed_rows(work.loaded.block(unit.layer), experts, unit.layer, batches, calibration)
    for stage in expert_stages(experts, prefix, rows):
        weights = {name: linear_weight(modules[name]) for name in stage.names}
        inputs = Inputs(
            hessians=dict.fromkeys(weights, stage.hessian),
            magnitude=torch.zeros(0),  # for AWQ alone, which is refused for experts
            groups=MomentWatch(weights, work.selection.grids),
        )
        work.solve(unit, weights, inputs, solved)
        for name in stage.names:
            set_linear_weight(modules[name], solved.dense(name))


@torch.no_grad()
def _advance(loaded: LoadedModel, layer: int, batches: list[Batch]) -> None:
    for batch in batches:
        batch.hidden = batch.run(loaded.block(layer), layer)


@contextmanager
def _restored(loaded: LoadedModel, layer: int) -> Iterator[None]:
    parameters = list(loaded.block(layer).parameters())
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.detach().copy_(original)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while; every submodule gets back the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
