"""Dequantized weights ready to be swapped into a model and out again. Step 6 (quantize), what the sweep runs on.

Takes a `LoadedModel`; returns weights per layer, and puts any set of such weights into the model for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.selection import select_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stored_form(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight `[out_features, in_features]` as the module stores it: its orientation, dtype and device."""
    own = linear_weight(module)
    weight = weight.to(own)
    return weight.t().contiguous() if is_conv1d(module) else weight


def quantize_bank(loaded: LoadedModel, grid: Grid) -> dict[int, dict[str, Tensor]]:
    """Every layer's weights after rounding to nearest, dequantized, as the modules store them.

    Modules that the grid does not fit are left out: they stay in 16 bit in every plan.

    Args:
        loaded: the model, not changed.
        grid: the integer grid.

    Returns:
        Layer → full module name → weight; every layer is there.

    Raises:
        ConfigError: the grid is not a grid, or fits no module.
        ArtifactError: a weight holds NaN or infinity.
    """
    selection = select_modules(loaded, grid)
    bank: dict[int, dict[str, Tensor]] = {}
    for layer, units in selection.units.items():
        modules = loaded.linears(layer)
        bank[layer] = {}
        for name in (name for unit in units for name in unit):
            rounded = quantize_rtn(linear_weight(modules[name]), grid, scale_dtype=loaded.storage_dtype)
            bank[layer][name] = stored_form(modules[name], rounded.dequantize())
    return bank


@contextmanager
def swapped(loaded: LoadedModel, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
    """The model with some weights replaced, for the time of a `with` block; bit-identical afterwards.

    Nothing is copied: the modules point to the given tensors, then to their own again. May be nested.

    Args:
        loaded: the model.
        weights: full module name → weight as the module stores it (`quantize_bank`, `QuantizedModel.dense_weights`).

    Yields:
        The model itself.

    Raises:
        ConfigError: a name that is no linear module of a block, or a weight of another shape, dtype or device.
    """
    modules = {name: module for layer in range(loaded.layers) for name, module in loaded.linears(layer).items()}
    for name, weight in weights.items():
        _check_fits(name, modules.get(name), weight)
    parameters = {name: modules[name].weight for name in weights}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, weight in weights.items():
            parameters[name].data = weight
        yield loaded.model
    finally:
        for name, original in originals.items():
            parameters[name].data = original


def _check_fits(name: str, module: nn.Module | None, weight: Tensor) -> None:
    if module is None:
        raise ConfigError(
            f"{name!r} is no linear module of the model's blocks; use the full names of LoadedModel.linears"
        )
    own = module.weight
    assert isinstance(own, nn.Parameter)
    if (weight.shape, weight.dtype, weight.device) != (own.shape, own.dtype, own.device):
        raise ConfigError(
            f"{name}: a weight {list(weight.shape)} {weight.dtype} on {weight.device} cannot replace one that is "
            f"{list(own.shape)} {own.dtype} on {own.device}; use stored_form"
        )
