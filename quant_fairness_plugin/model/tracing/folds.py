"""The fold of a fusion group: the module in front whose outputs can be divided by what the group is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from quant_fairness_plugin.model.architectures import Fold, FusionGroup
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.model.tracing.trial import Key, Trial

EQUAL = 1e-5
"""Largest difference of logits, relative to the largest one, that proves a fold. Norms compute in float32 whatever the
model's dtype, which leaves some 1e-7."""

MOVED = 1e-3
"""Smallest difference that one half of a fold alone must make; below, nothing would have been proved."""


def find_fold(trial: Trial, layers: Sequence[int], unit: FusionGroup) -> Fold | None:
    """Return the fold of a group that is proved; None where none of the candidates is."""
    layer = layers[0]
    read = next(event.read for event in trial.events[layer] if event.name in unit.modules)
    for fold in _candidates(trial, layer, unit, read):
        if is_proved(trial, layers, unit, fold):
            return fold
    return None


def _candidates(trial: Trial, layer: int, unit: FusionGroup, read: Key) -> Iterator[Fold]:
    """Yield the norm that wrote what a group reads, else the linear modules before it that are as wide as it reads.

    Only the first group that reads a norm may divide it: the integers of those before it are made by then.
    """
    columns, parent = trial.columns(layer, unit.modules[0]), unit.modules[0].rpartition(".")[0]
    readers = [event.name for event in trial.events[layer] if event.linear and event.read == read]
    also = tuple(name for name in readers if name not in unit.modules)
    for event in trial.events[layer]:
        if not event.linear and event.wrote == read:
            if readers[0] in unit.modules:
                norm = trial.blocks[layer].get_submodule(event.name)
                heads = 0 if _outputs(norm) == columns else 1  # a norm of each head, with the same weight for all
                yield Fold(unit.name, event.name, heads=heads, also=also)
                yield Fold(unit.name, event.name, offset=1.0, heads=heads, also=also)
            return
    for event in trial.events[layer]:
        if event.name in unit.modules:
            return
        rows = trial.rows(layer, event.name) if event.linear and event.parent == parent else 0
        if rows == columns:
            yield Fold(unit.name, event.name, also=also)
        elif rows and columns % rows == 0:
            for heads in trial.key_heads:
                if rows % heads == 0:
                    yield Fold(unit.name, event.name, heads=heads, also=also)


def is_proved(trial: Trial, layers: Sequence[int], unit: FusionGroup, fold: Fold) -> bool:
    """Whether the logits stay when a random scale is folded in all of the layers, and move when only half is done.

    All of them, because a layer may hand its keys and values on to later ones.
    """
    generator = torch.Generator().manual_seed(2)
    dtype = trial.model.dtype
    scales = {
        layer: 0.5 + torch.rand(trial.columns(layer, unit.modules[0]), generator=generator, dtype=dtype)
        for layer in layers
    }
    sources = {layer: trial.blocks[layer].get_submodule(fold.source) for layer in layers}
    if not all(_fits(fold, _outputs(source), len(scales[layer])) for layer, source in sources.items()):
        return False
    with trial.changed(layers):
        for layer, scale in scales.items():
            scales[layer] = scale = _spread(scale, _outputs(sources[layer]), fold.heads)
            _multiply(trial.blocks[layer], (*unit.modules, *fold.also), scale)
        if trial.distance() < MOVED:
            return False
        for layer, scale in scales.items():
            _divide(sources[layer], _heads_of(scale, _outputs(sources[layer]), fold.heads), fold.offset)
        return trial.distance() < EQUAL


def _fits(fold: Fold, rows: int, columns: int) -> bool:
    return columns % rows == 0 and rows % fold.heads == 0 if fold.heads else rows == columns


def _spread(scale: Tensor, rows: int, heads: int) -> Tensor:
    """Return a scale that is the same for all heads that read the same head of the source."""
    if not heads:
        return scale
    return scale[:rows].view(heads, 1, -1).expand(-1, len(scale) // rows, -1).flatten()


def _heads_of(scale: Tensor, rows: int, heads: int) -> Tensor:
    """Return the scale of the source's rows: that of the first head that reads each of its heads."""
    return scale.view(heads, -1, rows // heads)[:, 0].flatten() if heads else scale


def _outputs(source: nn.Module) -> int:
    if is_linear(source):
        return len(linear_weight(source))
    weight = source.weight
    assert isinstance(weight, nn.Parameter)
    return weight.numel()


def _multiply(block: nn.Module, names: Sequence[str], scale: Tensor) -> None:
    for name in names:
        linear_weight(block.get_submodule(name)).mul_(scale)


def _divide(source: nn.Module, scale: Tensor, offset: float) -> None:
    if is_linear(source):
        linear_weight(source).div_(scale[:, None])
    else:
        weight = source.weight
        assert isinstance(weight, nn.Parameter)
        weight.copy_((weight + offset) / scale - offset)
    bias = getattr(source, "bias", None)
    if isinstance(bias, nn.Parameter):
        bias.div_(scale)
