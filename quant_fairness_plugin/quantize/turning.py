"""Which heads of a model are turned before they are solved, and what of them no integers hold. See `model.turning`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import Turn
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.tracing import trace_blocks
from quant_fairness_plugin.model.turning import Turning, turnings


def layer_turnings(loaded: LoadedModel, layer: int) -> Iterator[Turning]:
    """Yield what is known to be turnable in a layer, with full names."""
    config, prefix = loaded.model.config.get_text_config(), f"{loaded.family.blocks}.{layer}."
    for found in turnings(config, _turns(loaded, layer), lambda name: loaded.matrix(prefix + name)):
        yield replace(found, values=prefix + found.values, output=prefix + found.output)


def _turns(loaded: LoadedModel, layer: int) -> tuple[Turn, ...]:
    family = loaded.family
    if family.kinds or str(loaded.model.config.model_type) in family.architecture.families:
        return family.kind_of(layer).turns
    try:  # blocks of a record's structure, but what its attention computes only a small model of its class shows
        return trace_blocks(loaded.model, family.blocks)[layer].turns
    except UnsupportedModelError:
        return ()


@torch.no_grad()
def turn_layer(loaded: LoadedModel, layer: int, quantized: Collection[str]) -> tuple[str, ...]:
    """Turn in place what can be turned in the block at hand.

    Args:
        loaded: the model.
        layer: the block.
        quantized: full names of the modules to quantize. Where values or what reads them is not among them, neither is
            turned: what keeps 16 bit keeps its bits.

    Returns:
        Full names of the modules that were turned.
    """
    modules, turned = loaded.linears(layer), list[str]()
    for turning in layer_turnings(loaded, layer):
        if turning.values in quantized and turning.output in quantized:
            turning.apply(modules)
            turned += [turning.values, turning.output]
    return tuple(turned)


@torch.no_grad()
def turned_rest(
    modules: Mapping[str, nn.Module], turned: Sequence[str], solved: Collection[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Round what no integers hold of turned modules to the storage dtype, in the block too: biases, and weights.

    Args:
        modules: full name → linear module of the block at hand.
        turned: full names.
        solved: full names of the modules that integers hold.
        dtype: of storage.

    Returns:
        Full parameter name → value as the module stores it, float32.
    """
    rest: dict[str, Tensor] = {}
    for name in turned:
        module = modules[name]
        parameters = {"bias": module.bias} if name in solved else {"weight": module.weight, "bias": module.bias}
        for kind, parameter in parameters.items():
            if isinstance(parameter, nn.Parameter):
                rounded = parameter.detach().to(dtype).float()
                parameter.detach().copy_(rounded)
                rest[f"{name}.{kind}"] = rounded
    return rest


def as_in_the_model(loaded: LoadedModel, name: str, weight: Tensor) -> Tensor:
    """Return the weight of a turned module, `[rows, columns]`, as it stands in the model, where nothing is turned."""
    turning = _turning_of(loaded, name)
    assert turning is not None, "only what can be turned is"
    return turning.undone(name, weight)


def turned_back(loaded: LoadedModel, name: str, weight: Tensor, original: Tensor) -> Tensor:
    """Return a weight of a checkpoint as it stands in the model, whether it was turned there or not.

    Args:
        loaded: the model.
        name: full name of a linear module.
        weight: `[rows, columns]`, near the original or near what that is turned.
        original: the model's own, `[rows, columns]`.
    """
    turning = _turning_of(loaded, name)
    if turning is None:
        return weight
    back = turning.undone(name, weight)
    return back if (back - original).norm() < (weight - original).norm() else weight


def _turning_of(loaded: LoadedModel, name: str) -> Turning | None:
    layer = int(name.removeprefix(f"{loaded.family.blocks}.").partition(".")[0])
    return next((found for found in layer_turnings(loaded, layer) if name in (found.values, found.output)), None)
