"""Linear modules: one orientation, `[out_features, in_features]`, for `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the module is a linear map that stores its weight transposed, `[in_features, out_features]`."""
    from transformers.pytorch_utils import Conv1D  # loads Transformers, which a plan does without

    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a linear map whose weight can be quantized."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight as `[out_features, in_features]`: a detached view, so writing to it writes to the module.

    Raises:
        TypeError: the module is neither `nn.Linear` nor `Conv1D`.
    """
    weight = _stored(module).detach()
    return weight.t() if is_conv1d(module) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a weight into the module's storage, converted to its dtype and device; tied tensors stay tied.

    Args:
        module: `nn.Linear` or `Conv1D`.
        weight: `[out_features, in_features]`.

    Raises:
        TypeError: the module is neither `nn.Linear` nor `Conv1D`.
        ValueError: the shape is not the module's.
    """
    target = linear_weight(module)
    if weight.shape != target.shape:
        raise ValueError(
            f"weight of shape {list(weight.shape)} does not fit a linear module that is {list(target.shape)}, "
            "[out_features, in_features]"
        )
    with torch.no_grad():
        target.copy_(weight)


def _stored(module: nn.Module) -> nn.Parameter:
    if not is_linear(module):
        raise TypeError(f"{type(module).__name__} is not a linear module; expected nn.Linear or Conv1D")
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
