"""What is in memory while a block is run: the block, its quantized weights, a slice of the head. Step 4 (sweep).

For a model that is read from its files while it runs (`StreamedModel`). One that is in memory is left as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.streamed import Head
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel, Table
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.memory import Needs, count_needs
from quant_fairness_plugin.sweep.tree import StateTree, Variant
from quant_fairness_plugin.sweep.units import UnitMap

Residence = Callable[[int], AbstractContextManager[None]]
"""Layer → its block has its parameters inside this context."""
_MMAP_THRESHOLD = -3
"""glibc's name (malloc.h) for the size from which an allocation is a mapping of its own."""
_LARGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class BlockBank:
    """A bank that keeps what it was asked for until it is told to forget: what belongs to one block."""

    loaded: LoadedModel
    units: UnitMap
    bank: Bank
    _made: dict[tuple[str, Precision], Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """That of the bank."""
        return self.bank.description

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        """Parameter → value as the model stores it."""
        key = (unit, precision)
        if key not in self._made:
            with _whole(self.loaded, self.units.parameters[unit]):
                self._made[key] = self.bank.weights(unit, precision)
        return self._made[key]

    def forget(self) -> None:
        """Free all of it."""
        self._made.clear()


@contextmanager
def block_feed(loaded: LoadedModel, layers: Sequence[int], *, prefetch: bool) -> Iterator[Residence]:
    """What makes one of these layers after the other resident; another thread reads the next one meanwhile.

    Args:
        loaded: the model.
        layers: in the order in which they will be asked for.
        prefetch: whether to read ahead.
    """
    if not isinstance(loaded, StreamedModel):
        yield lambda layer: nullcontext()
        return
    _return_freed_memory()
    model, following = loaded, dict(zip(layers, layers[1:], strict=False))
    coming: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def resident(layer: int) -> Iterator[None]:
        fetched = coming.pop(layer).result() if layer in coming else None
        with model.resident(layer, fetched):
            if prefetch and layer in following:
                coming[following[layer]] = reader.submit(model.fetch, following[layer])
            yield

    with ThreadPoolExecutor(max_workers=1) as reader:
        yield resident


def block_in_memory(loaded: LoadedModel, layer: int) -> AbstractContextManager[None]:
    """A context in which a block has its parameters."""
    return loaded.resident(layer) if isinstance(loaded, StreamedModel) else nullcontext()


def check_residence(loaded: LoadedModel, memory_budget: int | None, executor: object | None) -> None:
    """Refuse a way of sweeping that this model does not allow.

    Raises:
        ConfigError: blocks that are in no memory without a budget, or a budget for trials that run elsewhere.
    """
    if memory_budget is not None and executor is not None:
        raise ConfigError(
            "a memory budget and an executor do not go together: an executor gives each process a whole model; allowed "
            "is one of them. Leave out --executor, or --memory-budget."
        )
    if memory_budget is None and isinstance(loaded, StreamedModel):
        raise ConfigError(
            "the model is read from its files block by block and no memory budget is given; allowed is a number of "
            "bytes. Give memory_budget, or load the whole model."
        )


def find_head(loaded: LoadedModel, bank: Bank, variant: Variant) -> Head:
    """The output head with the weight that a variant gives it."""
    name = f"{loaded.family.head}.weight"
    bias = getattr(loaded.model.get_submodule(loaded.family.head), "bias", None)
    changed = [made[name] for unit, precision in variant if name in (made := bank.weights(unit, precision))]
    if changed:
        return Head(changed[-1], bias)
    table = _tables(loaded).get(name)
    weight = loaded.model.get_parameter(name)
    return Head(weight, bias) if table is None else _FileHead(weight, bias, table)


def sweep_needs(loaded: LoadedModel, tree: StateTree, units: UnitMap, tokens: int) -> Needs:
    """What a sweep of these states needs at once besides the hidden states between two layers.

    Args:
        loaded: the model, of which only shapes are looked at.
        tree: the states.
        units: the model's units.
        tokens: that a block is given at once.
    """
    held = [{precision for node in stage for _, precision in node.variant} for stage in tree.stages[1:-1]]
    around = {unit for stage in (tree.stages[0], tree.stages[-1]) for node in stage for unit, _ in node.variant}
    tables = _tables(loaded)
    places = {tables[name].place for unit in around for name in units.parameters[unit] if name in tables}
    return count_needs(
        {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()},
        blocks=loaded.family.blocks,
        precisions=max(map(len, held)),
        value_bytes=loaded.model.dtype.itemsize,
        tokens=tokens,
        widened=sum(prod(place.shape) for place in places),
    )


def _return_freed_memory() -> None:
    """Have the C library return large tensors to the system as soon as they are freed, from now on in this process.

    By default glibc learns to keep allocations of up to 32 MiB for itself, and weights of one block then lie scattered
    between those of the next: 0.3 GB more than was in use, and growing, for blocks of 60 million values (measured).
    """
    with suppress(AttributeError, OSError, TypeError):  # a C library without it, or no way to call it
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


@dataclass(frozen=True, slots=True)
class _FileHead(Head):
    """A head that is read slice by slice; a slice is kept until another one is asked for."""

    table: Table
    _last: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """Logits of a slice of the vocabulary, float32 `[…, slice]`."""
        key = (part.start, part.stop)
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.table.part(part)
        bias = None if self.bias is None else self.bias[part]
        return torch.nn.functional.linear(hidden, self._last[key], bias).float()


def _tables(loaded: LoadedModel) -> Mapping[str, Table]:
    return loaded.tables if isinstance(loaded, StreamedModel) else {}


def _whole(loaded: LoadedModel, names: Sequence[str]) -> AbstractContextManager[None]:
    return loaded.widened(names) if isinstance(loaded, StreamedModel) else nullcontext()
