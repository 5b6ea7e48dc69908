"""One fusion group on given inputs: integers, kept channels and folded scales. Step 6 (quantize).

`stream` walks through the model and collects the moments of the inputs; this solves a group by GPTQ or AWQ with them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Method
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.model.architectures import Fold
from quant_fairness_plugin.model.linear import set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.awq import solve_awq
from quant_fairness_plugin.quantize.columns import KeptColumns, Target, choose_columns, decoupled
from quant_fairness_plugin.quantize.folding import fold_source
from quant_fairness_plugin.quantize.gptq import GptqResult, output_loss, solve_gptq
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.grid_rules import has_columns
from quant_fairness_plugin.quantize.moments import MomentWatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every module of a run is solved with."""

    method: Method
    folds: Mapping[str, Fold]
    """AWQ: fusion group → where its input scale goes."""
    grids: Mapping[str, Grid]
    scale_dtype: torch.dtype
    damp: float
    act_order: bool
    columns: float
    """Share of the input channels of each module that keeps 16 bit."""


@dataclass(slots=True)
class Solved:
    """What a run has found so far; the fields are those of `QuantizedModel`."""

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, KeptColumns] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    """Of the modules of the block at hand that keep channels."""

    def keep(self, name: str, target: Target) -> None:
        """Note what a solved module lacks in the channels that it keeps."""
        self.targets[name], self.columns[name] = target, target.columns(self.tensors[name])

    def dense(self, name: str) -> Tensor:
        """What a solved module computes with."""
        return dense_values(self.tensors[name], self.columns.get(name))


def dense_values(tensor: QuantizedTensor, columns: KeptColumns | None) -> Tensor:
    """The weight that integers and kept channels stand for together, float32 `[rows, cols]`."""
    weight = tensor.dequantize()
    return weight if columns is None else columns.added_to(weight)


def solve_gptq_unit(
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    groups: MomentWatch,
    settings: Settings,
    solved: Solved,
) -> None:
    """Solve a fusion group with GPTQ; twice where channels are kept, because the first solution says which."""
    results = _gptq(weights, hessians, groups, settings)
    index = _chosen(
        {name: result.tensor.dequantize() - weights[name].float() for name, result in results.items()},
        hessians,
        settings,
    )
    if index is not None:
        apart = {name: decoupled(hessian, index) for name, hessian in hessians.items()}
        results = _gptq(weights, apart, groups, settings)
    for name, result in results.items():
        if result.damp_used > settings.damp:
            log.warning("%s: damping raised from %g to %g", name, settings.damp, result.damp_used)
        solved.tensors[name], solved.damping[name] = result.tensor, result.damp_used
        solved.losses[name] = result.loss_relative_to_output_energy
        if index is not None:
            wide = weights[name].float()
            solved.keep(name, Target(wide.clone(), index))
            solved.losses[name] = output_loss(wide, solved.dense(name), hessians[name])


def _gptq(
    weights: Mapping[str, Tensor], hessians: Mapping[str, Tensor], groups: MomentWatch, settings: Settings
) -> dict[str, GptqResult]:
    results: dict[str, GptqResult] = {}
    for name, hessian in hessians.items():
        with naming(name):
            results[name] = solve_gptq(
                weights[name].float(),
                hessian,
                settings.grids[name],
                scale_dtype=settings.scale_dtype,
                damp=settings.damp,
                act_order=settings.act_order,
                inputs=groups.inputs(name),
            )
    return results


def _chosen(
    errors: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    settings: Settings,
    *,
    scale: Tensor | None = None,
) -> Tensor | None:
    """The channels that a fusion group keeps in 16 bit; None if none."""
    if not has_columns(settings.grids[next(iter(errors))], settings.columns):
        return None
    return choose_columns(errors, hessians, settings.columns, scale=scale)


def solve_awq_unit(
    loaded: LoadedModel,
    layer: int,
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    magnitude: Tensor,
    settings: Settings,
    solved: Solved,
) -> None:
    """Solve a fusion group with AWQ and fold its scale; a source that is quantized already gets other scales."""
    names = tuple(weights)
    unit = next(unit for unit in loaded.family.units if names[0].endswith(f".{layer}.{unit.modules[0]}"))
    fold = settings.folds.get(unit.name)
    source = None if fold is None else fold_source(loaded, layer, fold, solved.tensors)
    with naming(names[0]):
        results, scale = solve_awq(
            weights,
            hessians,
            magnitude,
            settings.grids,
            scale_dtype=settings.scale_dtype,
            effective=None if source is None else source.effective,
            clipped=names if unit.name != "qkv" else names[2:],
        )
    scaled = {name: weight.float() * scale for name, weight in weights.items()}
    errors = {name: result.tensor.dequantize() - scaled[name] for name, result in results.items()}
    index = _chosen(errors, hessians, settings, scale=scale)
    for name, result in results.items():
        solved.tensors[name], solved.losses[name] = result.tensor, result.loss_relative_to_output_energy
        if index is not None:
            solved.keep(name, Target(scaled[name], index))
            solved.losses[name] = output_loss(weights[name].float(), solved.dense(name) / scale, hessians[name])
    if source is not None:
        folded = source.fold(scale)
        solved.folded |= folded.parameters
        if folded.tensor is not None:
            solved.tensors[source.name] = folded.tensor
        if source.name in solved.targets:
            solved.keep(source.name, solved.targets[source.name].divided(scale))
            set_linear_weight(source.module, solved.dense(source.name))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the module's name in front of an error's message."""
    try:
        yield
    except QuantFairnessError as err:
        raise type(err)(f"{name}: {err}") from err
