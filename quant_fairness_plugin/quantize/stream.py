"""Quantize a model block by block: takes a `LoadedModel` and a plan, returns a `QuantizedModel`.

With calibration, every module is solved on the inputs that it will get in the quantized model: those that come out of
the quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian.
AWQ folds each group's input scale into the module in front of it, which may be quantized by then: its integers stay and
its scales are divided.
Protected layers run in 16 bit and are left alone. At any time at most one block differs from the model passed in.
Of a `StreamedModel`, one block is in memory at a time; what is solved goes into files (`results`), and so do the rows
that do not fit the memory budget. In a folder to work in, an interrupted run goes on from the last whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import (
    ExpertCoverage,
    Grid,
    ProtectionPlan,
    Unit,
    digest,
    held,
    note_circumstances,
    package_versions,
    temporary_folder,
)
from quant_fairness_plugin.errors import ConfigError, ResourceError
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.model.experts import Experts
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import model_identity
from quant_fairness_plugin.model.streamed import StreamedModel, block_feed
from quant_fairness_plugin.quantize.blocks import Rows, Running
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.expert_rules import check_experts
from quant_fairness_plugin.quantize.experts import expert_stages, routed_rows
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.memory import count_quantize_needs
from quant_fairness_plugin.quantize.methods import check_method_grid, find_method, method_names
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.moments import FairMagnitude, MomentWatch, fair_moments, language_moments
from quant_fairness_plugin.quantize.results import Results, StoredResults
from quant_fairness_plugin.quantize.selection import Selection, select_modules
from quant_fairness_plugin.quantize.solving import Inputs, Problem, Solved, dense_values, error_prefix

BATCH_TOKENS = 2048
ROWS_IN_MEMORY = 256 << 20
"""Bytes of hidden states that a model read block by block has in memory where no budget is given."""
SOLUTION_VERSION = 1
"""Goes up whenever the same work would come out otherwise, so that an older folder is not gone on from."""
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model and the integers that replace some of its weights. The model object itself still is in 16 bit."""

    loaded: LoadedModel
    plan: ProtectionPlan
    """What it was made by."""
    method: str
    """A name of `methods.METHODS`."""
    tensors: Mapping[str, QuantizedTensor]
    """Full module name → integers, each with its grid (an INT8 unit has other bits than the plan's grid)."""
    folded: Mapping[str, Tensor]
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
    grids: Mapping[str, Grid] = field(default_factory=dict)
    """Full module name → its grid; empty where only the tensors say."""
    experts: ExpertCoverage | None = None
    """Of a mixture of experts: how calibration reached them, where that was counted."""

    @property
    def module_grids(self) -> dict[str, Grid]:
        """Full module name → its grid, without reading the integers where the grids are known."""
        return {name: self.grids.get(name) or self.tensors[name].grid for name in self.tensors}

    @property
    def bits(self) -> dict[str, int]:
        """Full module name → its bits."""
        return {name: grid.bits for name, grid in self.module_grids.items()}

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
class Workplace:
    """Where a quantization keeps what it has done."""

    folder: Path | None = None
    """To go on from after an interruption; None keeps nothing beyond the run."""
    memory_budget: int | None = None
    """Bytes for all that it holds, beside the interpreter and its libraries; None sets no limit."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What stays the same from the first block to the last."""

    loaded: LoadedModel
    method: Method
    selection: Selection
    columns: float
    report: Report
    results: Results

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
    workplace: Workplace | None = None,
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
        workplace: a folder to go on from after an interruption, and a memory budget. Neither changes a bit.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, a plan of another model, a grid
            that fits no module, or one that the method cannot be used with.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: a module cannot be solved (names it), or the method does not know the architecture.
        ResourceError: a budget that is too small, or a folder that cannot be written.
        ConfigError: another process does the same work in the folder.
    """
    place = workplace or Workplace()
    solver = find_method(method) if isinstance(method, str) else method
    selection = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    _check_model(loaded, plan, solver)
    _check(solver, plan, selection, calibration)
    allowance = _rows_allowance(loaded, calibration, place, batch_tokens)
    with ExitStack() as stack:
        folder = _work_folder(loaded, plan, solver, calibration, place, batch_tokens)
        if folder is not None:
            stack.enter_context(held(folder))
        in_files = folder is not None or isinstance(loaded, StreamedModel)
        results = StoredResults(folder) if in_files else Results()
        work = _Work(loaded, solver, selection, plan.protect_columns, progress or (lambda done, total: None), results)
        if calibration is None:
            _solve_from_weights(work)
        else:
            spill = folder or stack.enter_context(temporary_folder())
            rows = Rows(
                loaded, calibration, spill, batch_tokens=batch_tokens, allowance=allowance,
                durable=place.folder is not None,
            )  # fmt: skip
            _solve_on_inputs(work, rows, calibration)
    return QuantizedModel(
        loaded=loaded, plan=plan, method=solver.name, tensors=results.tensors, folded=results.folded,
        kept=selection.kept, losses=results.losses, damping=results.damping, calibration=calibration,
        columns=results.columns, grids=results.grids,
    )  # fmt: skip


def _check_model(loaded: LoadedModel, plan: ProtectionPlan, method: Method) -> None:
    """Refuse a plan of another model, and what the method does not do with this one."""
    if plan.layers != loaded.layers:
        raise ConfigError(
            f"the plan is for {plan.layers} layers, and the model has {loaded.layers}; use a plan of this model"
        )
    if any(group.routed for layer in range(loaded.layers) for group in loaded.family.units_of(layer)):
        check_experts(method.name, plan.grid, columns=plan.protect_columns)
    method.check_model(loaded)


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
def _solve_from_weights(work: _Work) -> None:
    """Solve by a method without calibration, for which the model is not run."""
    missing = [layer for layer in work.selection.units if not work.results.has(layer)]
    with block_feed(work.loaded, missing, prefetch=True) as resident:
        for layer in range(work.loaded.layers):
            if layer in missing:
                with resident(layer):
                    solved = Solved()
                    for unit, modules in work.units(layer):
                        weights = {name: linear_weight(module) for name, module in modules.items()}
                        work.solve(unit, weights, None, solved)
                    work.results.add(layer, solved)
            work.report(layer + 1, work.loaded.layers)


def _solve_on_inputs(work: _Work, rows: Rows, calibration: CalibrationSet) -> None:
    """Solve by a method with calibration, block after block as the rows reach it."""
    loaded = work.loaded
    to_solve = [layer for layer, units in work.selection.units.items() if units]
    missing = [layer for layer in to_solve if not work.results.has(layer)]
    done = 0
    if missing:
        with _evaluating(loaded.model):
            reached = rows.layer
            again = reached is None or reached > missing[0]
            rows.enter(again=again)
            layers = range(0 if again or reached is None else reached, to_solve[-1] + 1)
            with block_feed(loaded, layers, prefetch=True) as resident:
                for layer in layers:
                    with resident(layer), _restored(loaded, layer):
                        _solve_layer(work, layer, rows, calibration)
                        if layer < layers[-1]:  # what follows the last quantized layer needs no inputs
                            rows.advance(layer)
                    done = layer + 1
                    work.report(done, loaded.layers)
    rows.forget()
    if done < loaded.layers:
        work.report(loaded.layers, loaded.layers)


def _solve_layer(work: _Work, layer: int, rows: Rows, calibration: CalibrationSet) -> None:
    """Leave a block as it is quantized: solved now, or by the run that this one goes on from."""
    if work.results.has(layer):
        _put_back(work, layer)
        return
    solved, batches = Solved(), rows.batches()
    for unit, modules in work.units(layer):
        solve = _solve_experts if work.routed(unit) else _solve_unit
        solve(work, unit, modules, batches, calibration, solved)
    work.results.add(layer, solved)


@torch.no_grad()
def _put_back(work: _Work, layer: int) -> None:
    solved, modules = work.results.layer(layer), work.loaded.linears(layer)
    for name in solved.tensors:
        set_linear_weight(modules[name], solved.dense(name))
    for name, value in solved.folded.items():
        work.loaded.model.get_parameter(name).copy_(value)


@torch.no_grad()
def _solve_unit(
    work: _Work,
    unit: Unit,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Running],
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
    batches: Sequence[Running],
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


def _work_folder(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    method: Method,
    calibration: CalibrationSet | None,
    place: Workplace,
    batch_tokens: int,
) -> Path | None:
    """Return the folder to go on from, which is named by all that the results depend on; None where none is wanted."""
    if place.folder is None:
        return None
    question = {
        "version": SOLUTION_VERSION,
        "model": model_identity(loaded),
        "storage": str(loaded.storage_dtype),
        "compute": str(loaded.model.dtype),
        "method": [method.name, asdict(method) if is_dataclass(method) else {}],
        "plan": [asdict(plan.grid), list(plan.protected_layers), dict(plan.overrides), plan.protect_columns],
        "calibration": None if calibration is None else [calibration.sha256, calibration.shares],
        "batch_tokens": batch_tokens,
    }
    circumstances = {
        "device": str(loaded.model.device),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
    folder = place.folder / f"quantize-{digest(question | circumstances)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note_circumstances(place.folder, question, circumstances)
    except OSError as err:
        raise ResourceError(
            f"{place.folder}: cannot be used ({err.strerror}); use a folder that can be written"
        ) from err
    return folder


def _rows_allowance(
    loaded: LoadedModel, calibration: CalibrationSet | None, place: Workplace, batch_tokens: int
) -> int | None:
    """Return how many bytes of hidden states are held in memory; None for all.

    Raises:
        ResourceError: a budget that does not hold a block and what solving it takes.
    """
    if place.memory_budget is None:
        return ROWS_IN_MEMORY if isinstance(loaded, StreamedModel) else None
    rows = [] if calibration is None else [len(row) for rows in calibration.rows.values() for row in rows]
    needs = count_quantize_needs(
        {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()},
        blocks=loaded.family.blocks,
        tokens=max(*rows, batch_tokens) if rows else 0,
        hessians=calibration is not None,
    )
    return needs.left_for_states(place.memory_budget)


@contextmanager
def _restored(loaded: LoadedModel, layer: int) -> Iterator[None]:
    if isinstance(loaded, StreamedModel):  # the block is read again from its file
        yield
        return
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
