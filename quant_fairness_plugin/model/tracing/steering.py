"""Modules that give one number a head, which steers a recurrent layer: they keep 16 bit."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.architectures import BlockKind, FusionGroup
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.tracing.groups import plain_name

STEERS = "gives one number a head, which steers what a layer remembers or lets pass"


def head_counts(model: PreTrainedModel) -> frozenset[int]:
    """Return every number of heads that the config says, and twice each: of attention, of keys, of recurrent layers."""
    config = model.config.to_dict()
    counts = {value for key, value in config.items() if "head" in key and "dim" not in key and type(value) is int}
    return frozenset(times * count for count in counts for times in (1, 2))


def without_steering(kind: BlockKind, candidates: frozenset[str], block: nn.Module, heads: frozenset[int]) -> BlockKind:
    """Return the kind with those modules kept that give one number a head, by the sizes of the model itself.

    In a recurrent layer these decide how fast its state decays: their error adds up over all tokens, and they are tiny.
    """
    steering = {name for name in candidates if _steers(block, name, heads)}
    if not steering:
        return kind
    units: list[FusionGroup] = []
    lost: dict[str, tuple[str, ...]] = {}
    for unit in kind.units:
        modules = tuple(name for name in unit.modules if name not in steering)
        if modules == unit.modules:
            units.append(unit)
            continue
        lost[unit.name] = tuple(name for name in unit.modules if name in steering)
        if modules:
            name = unit.name if unit.fused else plain_name(modules)
            units.append(FusionGroup(name, modules, unit.fused))
    # What a fold multiplied as a part of its group, it still has to.
    names = {old.name: new.name for old in kind.units for new in units if new.modules[0] in old.modules}
    folds = tuple(
        replace(fold, unit=names[fold.unit], also=(*fold.also, *lost.get(fold.unit, ())))
        for fold in kind.folds
        if fold.unit in names
    )
    return BlockKind(tuple(units), folds, (*kind.kept, *((name, STEERS) for name in sorted(steering))))


def _steers(block: nn.Module, name: str, heads: frozenset[int]) -> bool:
    """Whether a module gives one or two numbers a head, as many as its parent has in a vector of its own."""
    parent = block.get_submodule(name.rpartition(".")[0])
    vectors = [p.numel() for p in parent.parameters(recurse=False) if p.dim() == 1]
    rows = len(linear_weight(block.get_submodule(name)))
    return rows in heads and rows in {times * size for size in vectors for times in (1, 2)}
