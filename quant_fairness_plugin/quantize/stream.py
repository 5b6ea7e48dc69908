"""Quantize a model block by block. Step 6 (quantize): takes a `LoadedModel`, returns a `QuantizedModel`.

With GPTQ, every module is solved on the inputs that it will get in the quantized model: those that come out of the
quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian.
AWQ goes the same way, and folds each group's input scale into the module in front of it, which may be quantized by
then: its integers stay and its scales are divided.
Which input channels keep 16 bit (`columns`) is chosen when a group is solved; GPTQ then solves it again without them.
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
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.blocks import Batch, first_inputs
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.folding import model_folds
from quant_fairness_plugin.quantize.gptq import DEFAULT_DAMP
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from quant_fairness_plugin.quantize.moments import FairMagnitude, MomentWatch, fair_moments, language_moments
from quant_fairness_plugin.quantize.selection import NO_OVERRIDES, Selection, select_modules
from quant_fairness_plugin.quantize.solving import (
    Settings,
    Solved,
    dense_values,
    naming,
    solve_awq_unit,
    solve_gptq_unit,
)

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
    columns: Mapping[str, KeptColumns] = field(default_factory=dict)
    """Full module name → the input channels that keep 16 bit beside its integers."""

    def dense_weight(self, name: str) -> Tensor:
        """What a quantized module computes with, kept channels included: float32 `[rows, cols]`."""
        return dense_values(self.tensors[name], self.columns.get(name))

    def dense_weights(self) -> dict[str, Tensor]:
        """Everything that `bank.swapped` needs to compute the quantized model.

        Full module name → dequantized weight as the module stores it, and full parameter name → folded value, in the
        parameter's own dtype and device.
        """
        modules = {
            name: module for layer in range(self.loaded.layers) for name, module in self.loaded.linears(layer).items()
        }
        dense = {name: stored_form(modules[name], self.dense_weight(name)) for name in self.tensors}
        return dense | {name: value.to(self.loaded.model.get_parameter(name)) for name, value in self.folded.items()}


def quantize_model(
    loaded: LoadedModel,
    protected: Collection[int],
    *,
    method: Method,
    grid: Grid,
    calibration: CalibrationSet | None = None,
    overrides: Mapping[str, Precision] = NO_OVERRIDES,
    columns: float = 0.0,
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
        columns: share of the input channels of each module that keeps 16 bit; `rtn` cannot tell which they should be.
        damp: GPTQ's damping, as a share of the mean Hessian diagonal.
        act_order: GPTQ's column order by Hessian diagonal (static; nothing of it shows in the result's layout).
        batch_tokens: most calibration tokens that are run at once.
        progress: called with (layers done, layers) after each layer.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, columns without a calibration, or a
            grid that fits no module.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: a module cannot be solved (names it), or AWQ does not know the architecture.
    """
    selection = select_modules(loaded, grid, protected=protected, overrides=overrides)
    _check_method(method, calibration, grid)
    if columns and calibration is None:
        raise ConfigError(
            f"columns {columns} cannot be used with method 'rtn': which channels matter only calibration tells; use "
            "'gptq' or 'awq'"
        )
    report = progress or (lambda done, total: None)
    settings = Settings(
        method=method, folds=model_folds(loaded) if method == "awq" else {}, grids=selection.grids,
        scale_dtype=loaded.storage_dtype, damp=damp, act_order=act_order, columns=columns,
    )  # fmt: skip
    empty = QuantizedModel(
        loaded=loaded, method=method, grid=grid, protected=selection.protected, tensors={}, kept=selection.kept,
        losses={}, damping={}, calibration=calibration, overrides=dict(overrides), folded={},
    )  # fmt: skip
    if calibration is None:
        return replace(empty, tensors=_round_all(loaded, selection, settings, report))
    solved = _solve_all(loaded, selection, settings, calibration, batch_tokens=batch_tokens, report=report)
    return replace(
        empty, tensors=solved.tensors, losses=solved.losses, damping=solved.damping, folded=solved.folded,
        columns=solved.columns,
    )  # fmt: skip


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
    loaded: LoadedModel, selection: Selection, settings: Settings, report: Callable[[int, int], None]
) -> dict[str, QuantizedTensor]:
    tensors: dict[str, QuantizedTensor] = {}
    for layer in range(loaded.layers):
        modules = loaded.linears(layer)
        for name in (name for unit in selection.units.get(layer, ()) for name in unit):
            with naming(name):
                weight = linear_weight(modules[name])
                tensors[name] = quantize_rtn(weight, settings.grids[name], scale_dtype=settings.scale_dtype)
        report(layer + 1, loaded.layers)
    return tensors


def _solve_all(
    loaded: LoadedModel,
    selection: Selection,
    settings: Settings,
    calibration: CalibrationSet,
    *,
    batch_tokens: int,
    report: Callable[[int, int], None],
) -> Solved:
    solved = Solved()
    last = max(selection.units)
    with _evaluating(loaded.model):
        batches = first_inputs(loaded, calibration, batch_tokens=batch_tokens)
        for layer in range(loaded.layers):
            units = selection.units.get(layer, ())
            with _restored(loaded, layer):
                solved.targets.clear()
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
    settings: Settings,
    batches: list[Batch],
    calibration: CalibrationSet,
    solved: Solved,
) -> None:
    """Solve the modules of one fusion group and leave their dequantized weights in the block."""
    modules = loaded.linears(layer)
    weights = {name: linear_weight(modules[name]) for name in names}
    magnitude, groups = FairMagnitude(calibration.shares), MomentWatch(weights, settings.grids)
    with naming(names[0]):
        moments = language_moments(loaded.block(layer), modules[names[0]], layer, batches, calibration)
        hessians = fair_moments(groups.watch(magnitude.watch(moments)), weights, calibration.shares)
    if settings.method == "awq":
        solve_awq_unit(loaded, layer, weights, hessians, magnitude.value, settings, solved)
    else:
        solve_gptq_unit(weights, hessians, groups, settings, solved)
    for name in names:
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
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
