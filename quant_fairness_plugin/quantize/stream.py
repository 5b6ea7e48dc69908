"""Quantize a model block by block. Step 6 (quantize): takes a `LoadedModel`, returns a `QuantizedModel`.

With GPTQ, every module is solved on the inputs that it will get in the quantized model: those that come out of the
quantized blocks before it and, within its block, of the modules before it (*true sequential*: attention output is
calibrated with quantized q, k, v). Modules of one fusion group share their inputs, so they share a Hessian.
Protected layers run in 16 bit and are left alone. At any time at most one block differs from the model passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Grid, Method
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.bank import stored_form
from quant_fairness_plugin.quantize.blocks import Batch, first_inputs, input_moment
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.gptq import DEFAULT_DAMP, GptqResult, solve_gptq
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from quant_fairness_plugin.quantize.selection import Selection, select_modules

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
    """Full module name → integers."""
    kept: dict[str, str]
    """Module of a quantized layer that stays in 16 bit → reason."""
    losses: dict[str, float]
    """GPTQ: module → squared output error over squared output on the calibration text; empty for RTN."""
    damping: dict[str, float]
    """GPTQ: module → damping used; empty for RTN."""
    calibration: CalibrationSet | None

    def dense_weights(self) -> dict[str, Tensor]:
        """Full module name → dequantized weight as the module stores it (`bank.swapped` takes it)."""
        modules = {
            name: module for layer in range(self.loaded.layers) for name, module in self.loaded.linears(layer).items()
        }
        return {name: stored_form(modules[name], tensor.dequantize()) for name, tensor in self.tensors.items()}


@dataclass(frozen=True, slots=True)
class _Settings:
    """What every module of a GPTQ run is solved with."""

    grid: Grid
    scale_dtype: torch.dtype
    damp: float
    act_order: bool


def quantize_model(
    loaded: LoadedModel,
    protected: Collection[int],
    *,
    method: Method,
    grid: Grid,
    calibration: CalibrationSet | None = None,
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
        method: `rtn` (no calibration) or `gptq`.
        grid: the integer grid; modules that it does not fit stay in 16 bit and are listed in `kept`.
        calibration: token rows for `gptq`; must be None for `rtn`.
        damp: GPTQ's damping, as a share of the mean Hessian diagonal.
        act_order: GPTQ's column order by Hessian diagonal (static; nothing of it shows in the result's layout).
        batch_tokens: most calibration tokens that are run at once.
        progress: called with (layers done, layers) after each layer.

    Raises:
        ConfigError: an unknown method, a calibration that is missing or not needed, or a grid that fits no module.
        InvalidLayerError: a protected layer that the model lacks, or all of them.
        ArtifactError: a weight holds NaN or infinity (names the module).
        UnsupportedModelError: a module cannot be solved (names it).
    """
    selection = select_modules(loaded, grid, protected=protected)
    _check_method(method, calibration)
    report = progress or (lambda done, total: None)
    settings = _Settings(grid=grid, scale_dtype=loaded.storage_dtype, damp=damp, act_order=act_order)
    empty = QuantizedModel(
        loaded=loaded, method=method, grid=grid, protected=selection.protected, tensors={}, kept=selection.kept,
        losses={}, damping={}, calibration=calibration,
    )  # fmt: skip
    if calibration is None:
        return replace(empty, tensors=_round_all(loaded, selection, settings, report))
    results = _solve_all(loaded, selection, settings, calibration, batch_tokens=batch_tokens, report=report)
    return replace(
        empty,
        tensors={name: result.tensor for name, result in results.items()},
        losses={name: result.loss_relative_to_output_energy for name, result in results.items()},
        damping={name: result.damp_used for name, result in results.items()},
    )


def _check_method(method: Method, calibration: CalibrationSet | None) -> None:
    if method not in {"rtn", "gptq"}:
        raise ConfigError(f"method {method!r} cannot be used here; use 'rtn' or 'gptq'")
    if method == "gptq" and calibration is None:
        raise ConfigError("method 'gptq' needs calibration text and got none; pass build_calibration(…), or use 'rtn'")
    if method == "rtn" and calibration is not None:
        raise ConfigError("method 'rtn' uses no calibration text but got some; pass None, or use 'gptq'")


def _round_all(
    loaded: LoadedModel, selection: Selection, settings: _Settings, report: Callable[[int, int], None]
) -> dict[str, QuantizedTensor]:
    tensors: dict[str, QuantizedTensor] = {}
    for layer in range(loaded.layers):
        modules = loaded.linears(layer)
        for name in (name for unit in selection.units.get(layer, ()) for name in unit):
            with _naming(name):
                weight = linear_weight(modules[name])
                tensors[name] = quantize_rtn(weight, settings.grid, scale_dtype=settings.scale_dtype)
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
) -> dict[str, GptqResult]:
    results: dict[str, GptqResult] = {}
    last = max(selection.units)
    with _evaluating(loaded.model):
        batches = first_inputs(loaded, calibration, batch_tokens=batch_tokens)
        for layer in range(loaded.layers):
            units = selection.units.get(layer, ())
            with _restored(loaded, layer):
                for names in units:
                    results |= _solve_unit(loaded, layer, names, settings, batches, calibration)
                if layer < last:  # what follows the last quantized layer needs no inputs
                    _advance(loaded, layer, batches)
            report(layer + 1, loaded.layers)
    return results


@torch.no_grad()
def _solve_unit(
    loaded: LoadedModel,
    layer: int,
    names: tuple[str, ...],
    settings: _Settings,
    batches: list[Batch],
    calibration: CalibrationSet,
) -> dict[str, GptqResult]:
    """Solve the modules of one fusion group and leave their dequantized weights in the block."""
    modules = loaded.linears(layer)
    with _naming(names[0]):
        moment = input_moment(loaded.block(layer), modules[names[0]], layer, batches, calibration)
    results: dict[str, GptqResult] = {}
    for name in names:
        with _naming(name):
            results[name] = solve_gptq(
                linear_weight(modules[name]).float(),
                moment,
                settings.grid,
                scale_dtype=settings.scale_dtype,
                damp=settings.damp,
                act_order=settings.act_order,
            )
        if results[name].damp_used > settings.damp:
            log.warning("%s: damping raised from %g to %g", name, settings.damp, results[name].damp_used)
        set_linear_weight(modules[name], results[name].tensor.dequantize())
    return results


@torch.no_grad()
def _advance(loaded: LoadedModel, layer: int, batches: list[Batch]) -> None:
    for batch in batches:
        batch.hidden = batch.run(loaded.block(layer), layer)


@contextmanager
def _restored(loaded: LoadedModel, layer: int) -> Iterator[None]:
    modules = loaded.linears(layer)
    originals = {name: linear_weight(module).clone() for name, module in modules.items()}
    try:
        yield
    finally:
        for name, weight in originals.items():
            set_linear_weight(modules[name], weight)


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
