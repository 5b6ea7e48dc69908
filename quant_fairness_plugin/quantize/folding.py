"""Where the input scale of a fusion group can go without changing what the model computes. For AWQ.

AWQ multiplies the input channels of a weight by a scale, and whatever produces these inputs must be divided by it: the
norm in front, or a linear module whose output reaches them through nothing but products (up → down of a gated MLP,
v → o) or a positively homogeneous activation (ReLU). Takes a `LoadedModel`; returns a `Fold` per fusion group, and for
one block the `Source` that a scale is folded into.

What is folded is stored in 16 bit. `Source.effective` therefore returns the scale that the rounded source really was
divided by, so that the weight behind it can make up for exactly that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import Fold, known_families
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.grid import SMALLEST_SCALE, QuantizedTensor

HOMOGENEOUS = frozenset({"relu"})
"""Names of activations with f(c x) = c f(x) for every c > 0."""


def check_folds(loaded: LoadedModel) -> None:
    """Refuse an architecture of which no fold is known: one without a record in which tracing proved none.

    Raises:
        UnsupportedModelError: it is one.
    """
    kind = str(loaded.model.config.model_type)
    family = loaded.family
    # Of another `model_type` with blocks of a record's structure, it is not known what its norms and activations do.
    known = kind in family.architecture.families or family.kinds
    if not known or not any(family.kind_of(layer).folds for layer in range(loaded.layers)):
        raise UnsupportedModelError(
            f"{kind}: it is not known where AWQ's scales can be folded in this architecture; method 'awq' works with "
            f"{', '.join(known_families())} and where a small model shows it. Use method 'gptq' or 'rtn'"
        )


def model_folds(loaded: LoadedModel, layer: int = 0) -> dict[str, Fold]:
    """Return fusion group → fold, for those groups of a layer whose input scale can be folded away exactly.

    Raises:
        UnsupportedModelError: an architecture whose norms and activations are not known.
    """
    check_folds(loaded)
    return {fold.unit: fold for fold in loaded.family.kind_of(layer).folds if _exact(loaded, layer, fold)}


def _exact(loaded: LoadedModel, layer: int, fold: Fold) -> bool:
    """Return whether dividing the source and multiplying the unit changes nothing in this very model."""
    block, config = loaded.block(layer), loaded.model.config
    source = block.get_submodule(fold.source)
    proved = bool(loaded.family.kinds)  # on a small model of the same config, norms and activations included
    if not is_linear(source):
        if proved:
            return True
        # Where the norm comes after the addition, its output is the next residual as well.
        after = not getattr(config, "do_layer_norm_before", True)
        return not after and not getattr(config, "apply_residual_connection_post_layernorm", False)
    if fold.activated and not proved:
        activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
        return activation in HOMOGENEOUS
    unit = next(unit for unit in loaded.family.units_of(layer) if unit.name == fold.unit)
    rows, cols = len(linear_weight(source)), linear_weight(block.get_submodule(unit.modules[0])).shape[1]
    # Grouped kv heads: several input channels of o read one output channel of v.
    return cols % rows == 0 and rows % fold.heads == 0 if fold.heads else rows == cols


@dataclass(frozen=True, slots=True)
class Folded:
    """A source after a scale was folded into it."""

    parameters: dict[str, Tensor]
    """Full parameter name → new value as the module stores it, float32 with values of the storage dtype."""
    tensor: QuantizedTensor | None
    """The quantized weight with its new scales; None where the source is a norm or in 16 bit."""


@dataclass(frozen=True, slots=True)
class Source:
    """A norm, a 16-bit linear module or a quantized one, as it stands in a block."""

    name: str
    """Full module name."""
    module: nn.Module
    offset: float
    dtype: torch.dtype
    """The storage dtype."""
    tensor: QuantizedTensor | None = None
    """The integers, where the module is quantized already."""
    heads: int = 0
    """As in `Fold`."""

    def by_row(self, scale: Tensor) -> Tensor:
        """Return what each row of the source is to be divided by: of the scales of all that read it, the mean of logs.

        Args:
            scale: of the input channels of the group, `[cols]`.
        """
        if not self.heads:
            return scale
        width = len(self._lead()) // self.heads
        several = scale.view(self.heads, -1, width)
        first = several[:, 0]
        # Where they agree already, not a bit of them changes.
        return torch.where((several == first[:, None]).all(1), first, several.log().mean(1).exp()).flatten()

    def effective(self, scale: Tensor) -> Tensor:
        """Return the scale, `[cols]`, that the source is divided by where `scale` is wanted.

        For a norm it differs from `scale` by the rounding of the new weight, for a linear module by what its rounded
        row has in common. It is 1 for a channel that 16 bit cannot hold after the division: one that overflows, falls
        below what the dtype resolves, or is 0 anyway.
        """
        effective = self._divided(self.by_row(scale))[1]
        if not self.heads:
            return effective
        readers = len(scale) // len(effective)
        return effective.view(self.heads, 1, -1).expand(-1, readers, -1).flatten()

    def fold(self, scale: Tensor) -> Folded:
        """Divide the source by `effective(scale)`, in the model too. The integers of a quantized source stay."""
        lead, effective = self._divided(self.by_row(scale))
        parameters: dict[str, Tensor] = {}
        tensor = self.tensor
        if tensor is not None:
            floor = SMALLEST_SCALE[tensor.scales.dtype]
            tensor = replace(tensor, scales=lead.to(tensor.scales.dtype).clamp(min=floor))
            _set(self.module, "weight", self._stored(tensor.dequantize()))
        else:
            value = self._stored(lead) if is_linear(self.module) else lead.squeeze(1) - self.offset
            parameters[f"{self.name}.weight"] = _set(self.module, "weight", value)
        if getattr(self.module, "bias", None) is not None:
            value = (_parameter(self.module, "bias").float() / effective).to(self.dtype).float()
            parameters[f"{self.name}.bias"] = _set(self.module, "bias", value)
        return Folded(parameters, tensor)

    def _divided(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rounded quotient of the source's rows, `[rows, n]`, and the scale `[rows]` that fits it best."""
        old = self._lead()
        wanted = scale.to(old).unsqueeze(1)
        new = (old / wanted - self.offset).to(self.dtype).float() + self.offset
        # Per row, the least-squares solution of old = effective * new: exact where a row is a single number.
        energy = (new * new).sum(1)
        effective = (old * new).sum(1) / energy
        error, size = (old - new * effective.unsqueeze(1)).norm(dim=1), old.norm(dim=1)
        usable = torch.isfinite(effective) & (effective > 0) & (error <= torch.finfo(self.dtype).eps * size)
        new = torch.where(usable.unsqueeze(1), new, (old - self.offset).to(self.dtype).float() + self.offset)
        return new, torch.where(usable, effective, torch.ones_like(effective))

    def _lead(self) -> Tensor:
        if self.tensor is not None:
            return self.tensor.scales.float()
        if is_linear(self.module):
            return linear_weight(self.module).float()
        return _parameter(self.module, "weight").float().unsqueeze(1) + self.offset

    def _stored(self, weight: Tensor) -> Tensor:
        stored = linear_weight(self.module)
        return weight if stored.is_contiguous() else weight.t().contiguous()


def fold_source(loaded: LoadedModel, layer: int, fold: Fold, tensors: Mapping[str, QuantizedTensor]) -> Source:
    """What a fold divides in one block.

    Args:
        loaded: the model, the block of which holds what earlier folds and quantized modules left there.
        layer: the block.
        fold: from `model_folds`.
        tensors: full module name → integers of what is quantized already.
    """
    name = f"{loaded.family.blocks}.{layer}.{fold.source}"
    module = loaded.block(layer).get_submodule(fold.source)
    return Source(name, module, fold.offset, loaded.storage_dtype, tensors.get(name), fold.heads)


def multiply_others(loaded: LoadedModel, layer: int, fold: Fold, scale: Tensor) -> dict[str, Tensor]:
    """Multiply what reads a fold's source outside of its group, in the model; rounded to the storage dtype.

    Returns:
        Full parameter name → new value as the module stores it, as in `Folded.parameters`.
    """
    values: dict[str, Tensor] = {}
    for name in fold.also:
        module = loaded.block(layer).get_submodule(name)
        wide = (linear_weight(module).float() * scale).to(loaded.storage_dtype).float()
        stored = wide if linear_weight(module).is_contiguous() else wide.t().contiguous()
        values[f"{loaded.family.blocks}.{layer}.{name}.weight"] = _set(module, "weight", stored)
    return values


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name)
    assert isinstance(parameter, nn.Parameter)
    return parameter.detach()


def _set(module: nn.Module, name: str, value: Tensor) -> Tensor:
    _parameter(module, name).copy_(value)
    return value
