"""Fusion groups and folds of an architecture without a record, seen in forward passes of a small random model.

A fusion group is what servers merge: linear modules of one parent that read the same tensor. A fold is a scale that the
inputs of a group can be multiplied by and the module in front divided by. Which module that is, is tried out in
float64: where the logits stay equal, the fold is *proved*; where they do not, it is none. No class name is read, and no
table of families. Names are only used to call things as the project and servers call them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import Block, BlockKind, Fold, FusionGroup
from quant_fairness_plugin.model.architectures.merged import MergedName, merged_names, reads_queries
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.model.small import narrow_models, randomize
from quant_fairness_plugin.model.structure import block_structure

EQUAL = 1e-5
"""Largest difference of logits, relative to the largest one, that proves a fold. Norms compute in float32 whatever the
model's dtype, which leaves some 1e-7."""
MOVED = 1e-3
"""Smallest difference that one half of a fold alone must make; below, nothing would have been proved."""
TOKENS = (5, 9, 77, 31, 120, 8, 44, 200, 3, 17)
NEVER_RUN = "no forward pass runs it"
STEERS = "gives one number a head, which steers what a layer remembers or lets pass"

Key = tuple[int, int, int]
"""Which tensor: where it begins, how many values it has, how often it was written to."""
_traced: dict[str, tuple[BlockKind, ...] | str] = {}
"""By class and config: what was found, or why nothing was. A model is looked at in every step of a run."""


def trace_blocks(model: PreTrainedModel, path: str) -> tuple[BlockKind, ...]:
    """Return what each block of a model is made of, one entry a layer.

    Args:
        model: a causal model, or the text decoder of another one, on any device, the meta device included; only its
            modules' names and shapes are looked at.
        path: full name of its list of blocks.

    Raises:
        UnsupportedModelError: no small model of its class can be built or run, or its blocks share modules.
    """
    key = f"{type(model).__module__}.{type(model).__qualname__} {path} {_config_text(model)}"
    if key not in _traced:
        try:
            _traced[key] = _trace(model, path)
        except UnsupportedModelError as err:
            _traced[key] = str(err)
    found = _traced[key]
    if isinstance(found, str):
        raise UnsupportedModelError(found)
    return found


def _config_text(model: PreTrainedModel) -> str:
    passing = {"_name_or_path", "dtype", "torch_dtype", "use_cache", "quantization_config", "transformers_version"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in passing}
    return json.dumps(config, sort_keys=True, default=str)


def _trace(model: PreTrainedModel, path: str) -> tuple[BlockKind, ...]:
    blocks = _blocks(model, path)
    structures = [block_structure(block) for block in blocks]
    first = {structure: layer for layer, structure in reversed(list(enumerate(structures)))}

    def accepts(outline: PreTrainedModel) -> bool:
        return {block_structure(block) for block in _blocks(outline, path)} >= first.keys()

    reason = "no small model of its class can be built"
    for small in narrow_models(model, max(2, 1 + max(first.values())), accepts):
        try:
            kinds = _kinds(_Trial(small, path), first.keys())
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here; another size may do
            reason = f"a small model of its class fails ({type(err).__name__}: {' '.join(str(err).split())[:120]})"
            continue
        heads = _head_counts(model)
        return tuple(_without_steering(*kinds[structures[i]], block, heads) for i, block in enumerate(blocks))
    raise UnsupportedModelError(f"its blocks cannot be traced: {reason}")


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def _kinds(trial: _Trial, wanted: Iterable[Block]) -> dict[Block, tuple[BlockKind, frozenset[str]]]:
    structures = [block_structure(block) for block in trial.blocks]
    return {
        structure: _kind(trial, [layer for layer, other in enumerate(structures) if other == structure])
        for structure in wanted
    }


def _kind(trial: _Trial, layers: Sequence[int]) -> tuple[BlockKind, frozenset[str]]:
    """Return what blocks of the small model that are built alike are made of, and their modules that may steer.

    These are all but those that read what the last linear module of their parent reads.
    """
    layer = layers[0]
    events = trial.events[layer]
    reads = [event for event in events if event.linear]
    called = {event.name for event in reads}
    units = tuple(_named_groups(trial, layer, reads))
    kept = [(name, NEVER_RUN) for name in block_structure(trial.blocks[layer]).linears if name not in called]
    folds = tuple(fold for unit in units if (fold := _find_fold(trial, layers, unit)) is not None)
    last = {event.parent: event.read for event in reads}
    before = frozenset(event.name for event in reads if event.read != last[event.parent])
    return BlockKind(units, folds, tuple(kept)), before


def _head_counts(model: PreTrainedModel) -> frozenset[int]:
    """Return every number of heads that the config says, and twice each: of attention, of keys, of recurrent layers."""
    config = model.config.to_dict()
    counts = {value for key, value in config.items() if "head" in key and "dim" not in key and type(value) is int}
    return frozenset(times * count for count in counts for times in (1, 2))


def _without_steering(
    kind: BlockKind, candidates: frozenset[str], block: nn.Module, heads: frozenset[int]
) -> BlockKind:
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
            name = unit.name if unit.fused else _plain_name(modules)
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


# Which modules read the same tensor


@dataclass(frozen=True, slots=True)
class _Event:
    """One call of a linear module or a norm."""

    name: str
    """Relative to the block."""
    linear: bool
    read: Key
    wrote: Key

    @property
    def parent(self) -> str:
        """The module that it is in; empty for the block itself."""
        return self.name.rpartition(".")[0]


class _Trial:
    """A small model, and what was seen when it ran."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        """Run the model once, in float64 where its code takes that."""
        self.model, self.blocks = model, _blocks(model, path)
        randomize(model)
        try:
            nn.Module.double(model)
            self.events = self._watch()
        except RuntimeError:  # code that mixes in float32 of its own
            nn.Module.float(model)
            self.events = self._watch()
        self.logits = self.run()
        self.key_heads = _key_heads(model)

    def run(self) -> Tensor:
        """Logits, `[1, tokens, vocabulary]`, or of a decoder without a head, its last hidden state."""
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        vocabulary = embedding.shape[0]
        ids = torch.tensor([[token % vocabulary for token in TOKENS]])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return logits

    def _watch(self) -> list[list[_Event]]:
        events: list[list[_Event]] = [[] for _ in self.blocks]
        alive: list[Tensor] = []  # a freed tensor's place is taken by another one
        hooks = []
        for layer, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if is_linear(module) or _is_norm(module):
                    note = partial(_note, name=name, events=events[layer], alive=alive)
                    hooks.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return events

    def distance(self) -> float:
        """How far the logits are from those of the model as it was, relative to the largest of these."""
        return float((self.run() - self.logits).abs().max() / self.logits.abs().max())

    @contextmanager
    def changed(self, layers: Sequence[int]) -> Iterator[None]:
        """Put the parameters of some blocks back at the end of a `with` block."""
        parameters = [parameter for layer in layers for parameter in self.blocks[layer].parameters()]
        values = [(parameter, parameter.detach().clone()) for parameter in parameters]
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter, value in values:
                parameter.detach().copy_(value)


def _key_heads(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the numbers of heads of keys and values that the config says."""
    config = model.config.to_dict()
    counts = {value for key, value in config.items() if "head" in key and ("kv" in key or "key_value" in key)}
    return tuple(sorted(count for count in counts if type(count) is int and count > 0))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies by a vector and does nothing else with parameters."""
    weight = getattr(module, "weight", None)
    inside = [parameter for parameter in module.parameters() if parameter.dim() != 1]
    return isinstance(weight, nn.Parameter) and not inside and not list(module.children())


def _note(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any,
    *, name: str, events: list[_Event], alive: list[Tensor],
) -> None:  # fmt: skip
    read = next((value for value in (*given, *named.values()) if isinstance(value, Tensor)), None)
    wrote = output[0] if isinstance(output, tuple) else output
    if read is None or not isinstance(wrote, Tensor) or any(event.name == name for event in events):
        return
    alive += [read, wrote]
    events.append(_Event(name, is_linear(module), _key(read), _key(wrote)))


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tensor.numel(), tensor._version


# Names


def _named_groups(trial: _Trial, layer: int, reads: Sequence[_Event]) -> Iterator[FusionGroup]:
    """Yield the fusion groups of a block in forward order, under names that are different."""
    taken: set[str] = set()
    # What stands in the block itself comes last: beside a whole MLP it is something else.
    parents = sorted(dict.fromkeys(event.parent for event in reads), key=lambda parent: not parent)
    found: list[FusionGroup] = []
    for parent in parents:
        events = [event for event in reads if event.parent == parent]
        whole = not {group.name for group in found}.isdisjoint(("down", "fc_out"))
        found += _plain(events) if whole and not parent else _groups_of_parent(trial, layer, events)
    order = {event.name: place for place, event in enumerate(reads)}
    for group in sorted(found, key=lambda group: min(order[name] for name in group.modules)):
        name = group.name if group.name not in taken else _plain_name(group.modules)
        taken.add(name)
        yield FusionGroup(name, group.modules, group.fused)


def _by_input(events: Sequence[_Event]) -> list[list[str]]:
    """Return the modules that read the same tensor, in the order in which these are read."""
    by_read: dict[Key, list[str]] = {}
    for event in events:
        by_read.setdefault(event.read, []).append(event.name)
    return list(by_read.values())


def _plain(events: Sequence[_Event]) -> list[FusionGroup]:
    return [_group(part, None) for names in _by_input(events) for part in merged_names(names)]


def _groups_of_parent(trial: _Trial, layer: int, events: Sequence[_Event]) -> list[FusionGroup]:
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
        gated = len(first) == 2 or _rows(trial, layer, first[0]) == 2 * _columns(trial, layer, last[0])
        start, end = ("gate_up", "down") if gated or known is not None else ("fc_in", "fc_out")
        start = start if len(first) <= 2 else None
    groups = [_group(part, None) for each in parts[1:-1] for part in each]
    head = [_group(part, start if len(parts[0]) == 1 else None) for part in parts[0]]
    tail = [_group(part, end) for part in parts[-1]] if len(inputs) > 1 else []
    return [*head, *groups, *tail]


def _group(part: MergedName, name: str | None) -> FusionGroup:
    return FusionGroup(part.name or name or _plain_name(part.modules), part.modules, part.fused)


def _plain_name(modules: Sequence[str]) -> str:
    """Return a name for modules that the project has none for: the module's own, or those of all of them."""
    parent = modules[0].rpartition(".")[0]
    names = "_".join(module.rpartition(".")[2] for module in modules)
    return f"{parent}.{names}" if parent else names


def _rows(trial: _Trial, layer: int, name: str) -> int:
    return linear_weight(trial.blocks[layer].get_submodule(name)).shape[0]


def _columns(trial: _Trial, layer: int, name: str) -> int:
    return linear_weight(trial.blocks[layer].get_submodule(name)).shape[1]


def _convolves(trial: _Trial, layer: int, name: str) -> bool:
    """Whether the parent of a module holds a convolution: a mixer of another kind than attention."""
    parent = trial.blocks[layer].get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, nn.Conv1d) for child in parent.children())


def _mixes(trial: _Trial, layer: int, before: Sequence[str], after: str) -> bool:
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


# Folds


def _find_fold(trial: _Trial, layers: Sequence[int], unit: FusionGroup) -> Fold | None:
    """Return the fold of a group that is proved; None where none of the candidates is."""
    layer = layers[0]
    read = next(event.read for event in trial.events[layer] if event.name in unit.modules)
    for fold in _candidates(trial, layer, unit, read):
        if _is_proved(trial, layers, unit, fold):
            return fold
    return None


def _candidates(trial: _Trial, layer: int, unit: FusionGroup, read: Key) -> Iterator[Fold]:
    """Yield the norm that wrote what a group reads, else the linear modules before it that are as wide as it reads.

    Only the first group that reads a norm may divide it: the integers of those before it are made by then.
    """
    columns, parent = _columns(trial, layer, unit.modules[0]), unit.modules[0].rpartition(".")[0]
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
        rows = _rows(trial, layer, event.name) if event.linear and event.parent == parent else 0
        if rows == columns:
            yield Fold(unit.name, event.name, also=also)
        elif rows and columns % rows == 0:
            for heads in trial.key_heads:
                if rows % heads == 0:
                    yield Fold(unit.name, event.name, heads=heads, also=also)


def _is_proved(trial: _Trial, layers: Sequence[int], unit: FusionGroup, fold: Fold) -> bool:
    """Whether the logits stay when a random scale is folded in all of the layers, and move when only half is done.

    All of them, because a layer may hand its keys and values on to later ones.
    """
    generator = torch.Generator().manual_seed(2)
    dtype = trial.model.dtype
    scales = {
        layer: 0.5 + torch.rand(_columns(trial, layer, unit.modules[0]), generator=generator, dtype=dtype)
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
