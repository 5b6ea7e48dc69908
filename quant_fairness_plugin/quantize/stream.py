"""Quantize a model block by block. Step 6 (quantize): takes a `LoadedModel`, returns a `QuantizedModel`.

With GPTQ, every module is solved on the inputs that it will get in the quantized model: those that come out of the
quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian.
AWQ goes the same way, and folds each group's input scale into the module in front of it, which may be quantized by
then: its integers stay and its scales are divided.
Protected layers run in 16 bit and are left alone. At any time at most one block differs from the model passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Grid, Method, Precision
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.awq import FairMagnitude, solve_awq
from quant_fairness_plugin.quantize.bank import stored_form
from quant_fairness_plugin.quantize.blocks import Batch, fair_moments, first_inputs, language_moments
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.folding import Fold, fold_source, model_folds
from quant_fairness_plugin.quantize.gptq import DEFAULT_DAMP, solve_gptq
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from quant_fairness_plugin.quantize.group_moments import MomentWatch
from quant_fairness_plugin.quantize.selection import NO_OVERRIDES, Selection, select_modules

log = logging.getLogger(__name__)

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """A model and the integers that replace some of its weights. The model object itself still is in 16 bit."""

    loaded: LoadedModel
    method: Method
    grid: Grid
    protected: tuple[int, ...]
    tensors: dict[str, QuantizedTensor]
    """Full module name → integers, each with its own grid (an INT8 unit has other bits than `grid`)."""
    overrides: Mapping[str, Precision]
    """Units with a precision of their own, as in `ProtectionPlan.overrides`."""
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

    def dense_weights(self) -> dict[str, Tensor]:
        """Everything that `bank.swapped` needs to compute the quantized model.

        Full module name → dequantized weight as the module stores it, and full parameter name → folded value, in the
        parameter's own dtype and device.
        """
        modules = {
            name: module for layer in range(self.loaded.layers) for name, module in self.loaded.linears(layer).items()
        }
        dense = {name: stored_form(modules[name], tensor.dequantize()) for name, tensor in self.tensors.items()}
        return dense | {name: value.to(self.loaded.model.get_parameter(name)) for name, value in self.folded.items()}


@dataclass(frozen=True, slots=True)
class _Settings:
    """What every module of a run is solved with."""

    method: Method
    folds: Mapping[str, Fold]
    """AWQ: fusion group → where its input scale goes."""
    grids: Mapping[str, Grid]
    scale_dtype: torch.dtype
    damp: float
    act_order: bool


@dataclass(slots=True)
class _Solved:
    """What a run has found so far; the fields are those of `QuantizedModel`."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)


def quantize_model(
    loaded: LoadedModel,
    protected: Collection[int],
    *,
    method: Method,
    grid: Grid,
    calibration: CalibrationSet | None = None,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    damp: float = DEFAULT_DAMP,
    act_order: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> QuantizedModel:
    """Quantize the linear modules of all layers but the protected ones.

    The model is bit-identical afterwards, also when an error or an interrupt ends the work.

    Args:
        loaded: the model; changed one block at a time while the work lasts.
        protected: layers that stay in 16 bit.
        method: `rtn` (no calibration), `gptq` or `awq`.
        grid: the integer grid; modules that it does not fit stay in 16 bit and are listed in `kept`.
        calibration: token rows and language weights for `gptq` and `awq`; must be None for `rtn`.
        overrides: units with another precision than the grid's, as in `ProtectionPlan.overrides`.
        damp: GPTQ's damping, as a share of the mean Hessian diagonal.
        act_order: GPTQ's column order by Hessian diagonal (static; nothing of it shows in the result's layout).
        batch_tokens: most calibration tokens that are run at once.
        progress: called with (layers done, layers) after each layer.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, or a grid that fits no module.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: a module cannot be solved (names it), or AWQ does not know the architecture.
    """
    selection = select_modules(loaded, grid, protected=protected, overrides=overrides)
    _check_method(method, calibration, grid)
    report = progress or (lambda done, total: None)
    settings = _Settings(
        method=method, folds=model_folds(loaded) if method == "awq" else {}, grids=selection.grids,
        scale_dtype=loaded.storage_dtype, damp=damp, act_order=act_order,
    )  # fmt: skip
    empty = QuantizedModel(
        loaded=loaded, method=method, grid=grid, protected=selection.protected, tensors={}, kept=selection.kept,
        losses={}, damping={}, calibration=calibration, overrides=dict(overrides), folded={},
    )  # fmt: skip
    if calibration is None:
        return replace(empty, tensors=_round_all(loaded, selection, settings, report))
    solved = _solve_all(loaded, selection, settings, calibration, batch_tokens=batch_tokens, report=report)
    return replace(empty, tensors=solved.tensors, losses=solved.losses, damping=solved.damping, folded=solved.folded)


def _check_method(method: Method, calibration: CalibrationSet | None, grid: Grid) -> None:
    if method not in {"rtn", "gptq", "awq"}:
        raise ConfigError(f"method {method!r} cannot be used here; use 'rtn', 'gptq' or 'awq'")
    if method != "rtn" and calibration is None:
        raise ConfigError(
            f"method {method!r} needs calibration text and got none; pass build_calibration(…), or use 'rtn'"
        )
    if method == "awq" and grid.clip == "minimax":
        raise ConfigError(
            "clip 'minimax' cannot be used with method 'awq', which clips by its own search; use clip 'absmax', or "
            "method 'gptq'"
        )
    if method == "rtn" and calibration is not None:
        raise ConfigError("method 'rtn' uses no calibration text but got some; pass None, or use 'gptq' or 'awq'")


def _round_all(
    loaded: LoadedModel, selection: Selection, settings: _Settings, report: Callable[[int, int], None]
) -> dict[str, QuantizedTensor]:
    tensors: dict[str, QuantizedTensor] = {}
    for layer in range(loaded.layers):
        modules = loaded.linears(layer)
        for name in (name for unit in selection.units.get(layer, ()) for name in unit):
            with _naming(name):
                weight = linear_weight(modules[name])
                tensors[name] = quantize_rtn(weight, settings.grids[name], scale_dtype=settings.scale_dtype)
        report(layer + 1, loaded.layers)
    return tensors


def _solve_all(
    loaded: LoadedModel,
    selection: Selection,
    settings: _Settings,
    calibration: CalibrationSet,
    *,
    batch_tokens: int,
    report: Callable[[int, int], None],
) -> _Solved:
    solved = _Solved()
    last = max(selection.units)
    with _evaluating(loaded.model):
        batches = first_inputs(loaded, calibration, batch_tokens=batch_tokens)
        for layer in range(loaded.layers):
            units = selection.units.get(layer, ())
            with _restored(loaded, layer):
                for names in units:
                    _solve_unit(loaded, layer, names, settings, batches, calibration, solved)
                if layer < last:  # what follows the last quantized layer needs no inputs
                    _advance(loaded, layer, batches)
            report(layer + 1, loaded.layers)
    return solved


@torch.no_grad()
def _solve_unit(
    loaded: LoadedModel,
    layer: int,
    names: tuple[str, ...],
    settings: _Settings,
    batches: list[Batch],
    calibration: CalibrationSet,
    solved: _Solved,
) -> None:
    """Solve the modules of one fusion group and leave their dequantized weights in the block."""
    modules = loaded.linears(layer)
    weights = {name: linear_weight(modules[name]) for name in names}
    magnitude, groups = FairMagnitude(calibration.shares), MomentWatch(weights, settings.grids)
    with _naming(names[0]):
        moments = language_moments(loaded.block(layer), modules[names[0]], layer, batches, calibration)
        hessians = fair_moments(groups.watch(magnitude.watch(moments)), weights, calibration.shares)
    if settings.method == "awq":
        _solve_awq_unit(loaded, layer, weights, hessians, magnitude.value, settings, solved)
    else:
        _solve_gptq_unit(weights, hessians, groups, settings, solved)
    for name in names:
        set_linear_weight(modules[name], solved.tensors[name].dequantize())


def _solve_gptq_unit(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    groups: MomentWatch,
    settings: _Settings,
    solved: _Solved,
) -> None:
    for name, hessian in hessians.items():
        with _naming(name):
            result = solve_gptq(
                weights[name].float(),
                hessian,
                settings.grids[name],
                scale_dtype=settings.scale_dtype,
                damp=settings.damp,
                act_order=settings.act_order,
                inputs=groups.inputs(name),
            )
        if result.damp_used > settings.damp:
            log.warning("%s: damping raised from %g to %g", name, settings.damp, result.damp_used)
        solved.tensors[name], solved.damping[name] = result.tensor, result.damp_used
        solved.losses[name] = result.loss_relative_to_output_energy


def _solve_awq_unit(
    loaded: LoadedModel,
    layer: int,
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    magnitude: Tensor,
    settings: _Settings,
    solved: _Solved,
) -> None:
    """Solve a fusion group with AWQ and fold its scale; a source that is quantized already gets other scales."""
    names = tuple(weights)
    unit = next(unit for unit in loaded.family.units if names[0].endswith(f".{layer}.{unit.modules[0]}"))
    fold = settings.folds.get(unit.name)
    source = None if fold is None else fold_source(loaded, layer, fold, solved.tensors)
    with _naming(names[0]):
        results, scale = solve_awq(
            weights,
            hessians,
            magnitude,
            settings.grids,
            scale_dtype=settings.scale_dtype,
            effective=None if source is None else source.effective,
            clipped=names if unit.name != "qkv" else names[2:],
        )
    for name, result in results.items():
        solved.tensors[name], solved.losses[name] = result.tensor, result.loss_relative_to_output_energy
    if source is not None:
        folded = source.fold(scale)
        solved.folded |= folded.parameters
        if folded.tensor is not None:
            solved.tensors[source.name] = folded.tensor


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
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the module's name in front of an error's message."""
    try:
        yield
    except QuantFairnessError as err:
        raise type(err)(f"{name}: {err}") from err
