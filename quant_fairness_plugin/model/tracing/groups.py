"""The fusion groups of a block: linear modules of one parent that read the same tensor, and how they are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.model.architectures import FusionGroup
from quant_fairness_plugin.model.architectures.merged import MergedName, merged_names, reads_queries
from quant_fairness_plugin.model.tracing.trial import Event, Key, Trial


def named_groups(trial: Trial, layer: int, reads: Sequence[Event]) -> Iterator[FusionGroup]:
    """Yield the fusion groups of a block in forward order, under names that are different."""
    taken: set[str] = set()
    # What stands in the block itself comes last: beside a whole MLP it is something else.
    parents = sorted(dict.fromkeys(event.parent for event in reads), key=lambda parent: not parent)
    groups: list[FusionGroup] = []
    for parent in parents:
        events = [event for event in reads if event.parent == parent]
        whole = not {group.name for group in groups}.isdisjoint(("down", "fc_out"))
        groups += _plain(events) if whole and not parent else _groups_of_parent(trial, layer, events)
    order = {event.name: place for place, event in enumerate(reads)}
    for group in sorted(groups, key=lambda group: min(order[name] for name in group.modules)):
        name = group.name if group.name not in taken else plain_name(group.modules)
        taken.add(name)
        yield FusionGroup(name, group.modules, group.fused)


def _by_input(events: Sequence[Event]) -> list[list[str]]:
    """Return the modules that read the same tensor, in the order in which these are read."""
    by_read: dict[Key, list[str]] = {}
    for event in events:
        by_read.setdefault(event.read, []).append(event.name)
    return list(by_read.values())


def _plain(events: Sequence[Event]) -> list[FusionGroup]:
    return [_group(part, None) for names in _by_input(events) for part in merged_names(names)]


def _groups_of_parent(trial: Trial, layer: int, events: Sequence[Event]) -> list[FusionGroup]:
    """Return the groups of the linear modules of one parent, under the project's names where it is built as usual."""
    inputs = _by_input(events)
    parts = [list(merged_names(names)) for names in inputs]
    first, last = inputs[0], inputs[-1]
    known = next((part for part in parts[0] if part.name is not None), None)
    if len(inputs) < 2 or len(last) > 1:
        start, end = None, None
    elif reads_queries(first) or _mixes(trial, layer, first, last[0]):
        whole = len(first) in (1, 3) and len(inputs) == 2 and not _convolves(trial, layer, first[0])
        start, end = ("qkv" if whole else None), "o"
    elif len(inputs) > 2:
        start, end = None, None
    else:
        gated = len(first) == 2 or trial.rows(layer, first[0]) == 2 * trial.columns(layer, last[0])
        start, end = ("gate_up", "down") if gated or known is not None else ("fc_in", "fc_out")
        start = start if len(first) <= 2 else None
    groups = [_group(part, None) for each in parts[1:-1] for part in each]
    head = [_group(part, start if len(parts[0]) == 1 else None) for part in parts[0]]
    tail = [_group(part, end) for part in parts[-1]] if len(inputs) > 1 else []
    return [*head, *groups, *tail]


def _group(part: MergedName, name: str | None) -> FusionGroup:
    return FusionGroup(part.name or name or plain_name(part.modules), part.modules, part.fused)


def plain_name(modules: Sequence[str]) -> str:
    """Return a name for modules that the project has none for: the module's own, or those of all of them."""
    parent = modules[0].rpartition(".")[0]
    names = "_".join(module.rpartition(".")[2] for module in modules)
    return f"{parent}.{names}" if parent else names


def _convolves(trial: Trial, layer: int, name: str) -> bool:
    """Whether the parent of a module holds a convolution: a mixer of another kind than attention."""
    parent = trial.blocks[layer].get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, nn.Conv1d) for child in parent.children())


def _mixes(trial: Trial, layer: int, before: Sequence[str], after: str) -> bool:
    """Whether what modules say of the first token changes what another one reads of later tokens: attention."""
    block = trial.blocks[layer]
    heard: list[Tensor] = []

    def listen(_: nn.Module, given: tuple[Any, ...]) -> None:
        heard.append(given[0].detach().clone())

    def shift(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        moved = output.clone()
        moved.view(-1, output.shape[-1])[0] += 1 + torch.arange(output.shape[-1]).to(output) / output.shape[-1]
        return moved

    hook = block.get_submodule(after).register_forward_pre_hook(listen)
    try:
        trial.run()
        shifts = [block.get_submodule(name).register_forward_hook(shift) for name in before]
        try:
            trial.run()
        finally:
            for one in shifts:
                one.remove()
    finally:
        hook.remove()
    rows = [values.reshape(-1, values.shape[-1]) for values in heard]
    return not torch.allclose(rows[0][1:], rows[1][1:])
