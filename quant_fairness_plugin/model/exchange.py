"""Weights swapped into a model and out again.

Takes a `LoadedModel` and weights as its modules store them; puts them into the model for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.model.load import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stored_form(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a weight `[out_features, in_features]` as the module stores it: its orientation, dtype and device."""
    weight = weight.to(linear_weight(module))
    return weight.t().contiguous() if is_conv1d(module) else weight


@contextmanager
def swapped(loaded: LoadedModel, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
    """Replace some parameters while the context is open; the model is bit-identical afterwards.

    Nothing is copied: the modules point to the given tensors, then to the former ones again. May be nested.

    Args:
        loaded: the model.
        weights: full name of a linear module of a block → its weight, or full name of any parameter
            (`….input_layernorm.weight`) → its value, as the module stores it (`stored_form`,
            `QuantizedModel.dense_weights`).

    Yields:
        The model itself.

    Raises:
        ConfigError: a name that is neither, or a value of another shape, dtype or device.
    """
    present = dict(loaded.model.named_parameters())
    linears = {name for layer in range(loaded.layers) for name in loaded.linears(layer)}
    parameters: dict[str, Tensor] = {}
    for name, value in weights.items():
        parameter = f"{name}.weight" if name in linears else name
        _check_fits(name, present.get(parameter), value)
        parameters[parameter] = value
    with exchanged(loaded.model, parameters):
        yield loaded.model


def _check_fits(name: str, old: nn.Parameter | None, value: Tensor) -> None:
    if old is None:
        raise ConfigError(
            f"{name!r} is neither a linear module of the model's blocks nor a parameter; use the full names of "
            "LoadedModel.linears, or of the model's named_parameters()"
        )
    if (value.shape, value.dtype, value.device) != (old.shape, old.dtype, old.device):
        raise ConfigError(
            f"{name}: a weight {list(value.shape)} {value.dtype} on {value.device} cannot replace one that is "
            f"{list(old.shape)} {old.dtype} on {old.device}; use stored_form"
        )


@contextmanager
def exchanged(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace parameters of a model while the context is open; bit-identical afterwards. Nothing is copied.

    Args:
        model: the model.
        values: full name of a parameter → its value, as the module stores it.
    """
    parameters = {name: model.get_parameter(name) for name in values}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, original in originals.items():
            parameters[name].data = original
