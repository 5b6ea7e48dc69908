"""Scores of a set of states with layers as the outer loop: every block is read and quantized once. Step 4 (sweep).

`score_plans` keeps the whole model and walks one batch after the other; here all batches go through a block before the
next one is read, so that a model larger than memory can be swept. What lies between two layers are the hidden states of
every batch and prefix (`Stacks`), in memory as far as the budget goes. Sums are made in the order of the batches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Batch, position_limit, sum_rows, tokenize
from quant_fairness_plugin.measure.streamed import score_hidden
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.tree import StateTree, Variant
from quant_fairness_plugin.plans.units import HEAD, UnitMap
from quant_fairness_plugin.sweep.bank import Bank, variant_weights
from quant_fairness_plugin.sweep.jobs import Found, Job
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT, HEAD_TOKENS, STACK_TOKENS, Needs, count_needs
from quant_fairness_plugin.sweep.stacks import Stacks, batches_in_memory
from quant_fairness_plugin.sweep.trials import Store, open_store, trial_key
from quant_fairness_plugin.sweep.walk import _tables, add_batch, find_head, finish, plan_tree, repeated

LAYERWISE_VERSION = 1
"""Goes up whenever the hidden states of a sweep would come out otherwise."""


@torch.no_grad()
def score_plans_layerwise(
    loaded: LoadedModel,
    plans: Mapping[str, Mapping[str, Precision]],
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    memory_budget: int,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    work: Path | None = None,
    prefetch: bool = True,
) -> dict[str, StateScores]:
    """The same as `score_plans`, with one block in memory at a time (see `open_streamed`).

    Equal to it up to the order of float32 additions (1e-5 nats a token). Neither the budget nor an interruption
    changes a bit of the result.

    Args:
        loaded: the model; a `StreamedModel` is read block by block, any other is in memory as a whole.
        plans: name → unit → precision; what is not listed is in 16 bit.
        texts: the sentences.
        units: the model's units.
        bank: their weights. It should keep none (`RtnBank(keep=False)`), as what a block needs is kept here.
        memory_budget: bytes for all that the sweep holds, see `memory`.
        batch_tokens: tokens of a batch.
        progress: called with (block passes done, in all).
        work: a folder that keeps the hidden states after every layer, and the scores of finished batches, so that a
            sweep that was killed goes on from there; None keeps nothing.
        prefetch: read the next block while one is run.

    Returns:
        `16 bit` and every plan → its scores.

    Raises:
        ConfigError: a unit that does not exist, or a `work` that is no folder.
        ArtifactError: a block cannot be read, or a plan predicts NaN or infinity.
        ResourceError: the budget is too small, or hidden states cannot be written.
    """
    tree = plan_tree(plans, units)
    tokenized = tokenize(loaded.tokenizer, texts, context=min(CONTEXT, position_limit(loaded.model)))
    batches = tokenized.batches(batch_tokens)
    most = max(STACK_TOKENS[loaded.model.device.type], *(batch.ids.numel() for batch in batches))
    allowance = sweep_needs(loaded, tree, units, most).left_for_states(memory_budget)
    job = Job(loaded, tree, bank, texts, torch.get_num_threads())
    store = None if work is None else open_store(work, job, layerwise=LAYERWISE_VERSION, batch_tokens=batch_tokens)
    with ExitStack() as resources:
        spill = work or Path(resources.enter_context(TemporaryDirectory(prefix="quant-fairness-")))
        stacks = _open_stacks(spill, store, job, batches, allowance)
        sweep = _Sweep(job, BlockBank(loaded, units, bank), batches, stacks, progress or (lambda done, total: None))
        found = sweep.run(store, prefetch=prefetch)
    totals = {name: tokenized.empty_totals() for name in tree.leaves}
    for batch, scores in zip(batches, found, strict=True):
        add_batch(totals, batch, scores)
    return finish(tokenized, totals)


@dataclass(slots=True)
class _Sweep:
    """All batches on their way through the model."""

    job: Job
    bank: BlockBank
    batches: Sequence[Batch]
    stacks: Stacks
    report: Callable[[int, int], None]
    passes: int = 0
    """Block passes done, each on one state of one batch."""

    def run(self, store: Store | None, *, prefetch: bool) -> list[Found]:
        """The scores of every batch."""
        kept = [None if store is None else store.read(batch.rows) for batch in self.batches]
        unfinished = [number for number, scores in enumerate(kept) if scores is None]
        self._enter([number for number in unfinished if self.stacks.stage(number) is None])
        reached = {number: self.stacks.stage(number) or 0 for number in unfinished}
        self._count_before(kept, reached)
        layers = range(min(reached.values(), default=self.job.loaded.layers), self.job.loaded.layers)
        with block_feed(self.job.loaded, layers, prefetch=prefetch) as resident:
            for layer in layers:
                with resident(layer):
                    self._run_layer(layer, [number for number in unfinished if reached[number] <= layer])
        return [self._leave(number, store) if scores is None else scores for number, scores in enumerate(kept)]

    def _enter(self, numbers: Sequence[int]) -> None:
        """Bring batches to the first block, in every variant of what comes before it."""
        entry = self.job.tree.stages[0]
        for number in numbers:
            with self.stacks.next_stage(number, 0, len(entry)) as following:
                for index, node in enumerate(entry):
                    with exchanged(self.job.loaded.model, variant_weights(self.bank, node.variant)):
                        following.put(index, rehearse(self.job.loaded, *self._inputs(number)).hidden)
        self.bank.forget()

    def _run_layer(self, layer: int, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._step(layer, number)
            self.passes += len(self.job.tree.stages[layer + 1])
            self._report()
        self.bank.forget()

    def _step(self, layer: int, number: int) -> None:
        """Run a block for all states of a batch."""
        loaded, stage = self.job.loaded, self.job.tree.stages[layer + 1]
        ids, mask = self._inputs(number)
        # Made again for every layer, as the masks of all batches would be held all the time. It costs a lookup.
        once = rehearse(loaded, ids, mask).calls[layer]
        twice = rehearse(loaded, ids.repeat(2, 1), mask.repeat(2, 1)).calls[layer]
        with self.stacks.next_stage(number, layer + 1, len(stage)) as following:
            for variant, nodes in self.job.tree.by_variant(layer + 1).items():
                with exchanged(loaded.model, variant_weights(self.bank, variant)):
                    for piece in _pieces(nodes, STACK_TOKENS[ids.device.type] // ids.numel()):
                        stacked = torch.cat([self.stacks.read(number, stage[node].parent) for node in piece])
                        output = repeated(once, twice, len(piece)).run(loaded.block(layer), stacked)
                        for node, part in zip(piece, torch.split(output, len(ids)), strict=True):
                            following.put(node, part)

    def _leave(self, number: int, store: Store | None) -> Found:
        """The scores of a batch whose states are after the last block."""
        batch, tree = self.batches[number], self.job.tree
        targets = batch.targets.to(self.job.loaded.model.device)
        own = find_head(self.job.loaded, self.bank, ())
        reference = self._given(number, (tree.leaves[BASELINE],), ())[0]
        per_leaf: dict[int, Tensor] = {}
        baseline = torch.zeros(len(targets), 3, dtype=torch.float64)
        for variant, leaves in tree.by_variant(len(tree.stages) - 1).items():
            changed = tuple(pair for pair in variant if pair[0] == HEAD)
            before = tuple(pair for pair in variant if pair[0] != HEAD)
            head = find_head(self.job.loaded, self.bank, changed) if changed else None
            for piece in _pieces(leaves, HEAD_TOKENS // batch.ids.numel()):
                nll, scores = score_hidden(reference, self._given(number, piece, before), targets, own, state_head=head)
                baseline[:, 0] = nll.cpu()
                per_leaf |= dict(zip(piece, scores.cpu(), strict=True))
        # A state that is the 16-bit model itself has no KL; rounding would give it one of about 1e-7.
        per_leaf[tree.leaves[BASELINE]] = baseline
        found = {name: sum_rows(batch, per_leaf[leaf], name, self.job.texts) for name, leaf in tree.leaves.items()}
        if store is not None:
            store.write(batch.rows, found)
        self.stacks.drop(number)
        return found

    def _given(self, number: int, leaves: Sequence[int], variant: Variant) -> Tensor:
        """What the head is given in some states, `[states, targets, width]`."""
        last, positions = self.job.tree.stages[-1], self.batches[number].positions
        found = []
        with exchanged(self.job.loaded.model, variant_weights(self.bank, variant)):
            for leaf in leaves:
                passed = self.stacks.read(number, last[leaf].parent)
                hidden = head_input(self.job.loaded, *self._inputs(number), passed)
                found.append(hidden.flatten(0, 1)[positions.to(hidden.device)])
        return torch.stack(found)

    def _inputs(self, number: int) -> tuple[Tensor, Tensor]:
        batch, device = self.batches[number], self.job.loaded.model.device
        return batch.ids.to(device), batch.mask.to(device)

    def _count_before(self, kept: Sequence[Found | None], reached: Mapping[int, int]) -> None:
        """Count what an interrupted sweep has done."""
        tree = self.job.tree
        self.passes = sum(tree.block_passes for scores in kept if scores is not None)
        self.passes += sum(len(stage) for stages in reached.values() for stage in tree.stages[1 : stages + 1])
        if self.passes:
            self._report()

    def _report(self) -> None:
        self.report(self.passes, len(self.batches) * self.job.tree.block_passes)


def _pieces(nodes: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (nodes[start : start + max(1, size)] for start in range(0, len(nodes), max(1, size)))


def _open_stacks(folder: Path, store: Store | None, job: Job, batches: Sequence[Batch], allowance: int) -> Stacks:
    model, family = job.loaded.model, job.loaded.family
    weight = job.loaded.block(0).get_submodule(family.modules(0)[0]).weight
    assert isinstance(weight, Tensor)
    width = weight.shape[0 if family.conv1d else 1]
    shapes = [(*batch.ids.shape, width) for batch in batches]
    most = max(len(stage) for stage in job.tree.stages[:-1])
    return Stacks(
        folder,
        [str(number) if store is None else trial_key(store.job, batch.rows) for number, batch in enumerate(batches)],
        shapes,
        model.dtype,
        model.device,
        batches_in_memory([prod(shape) * model.dtype.itemsize * most for shape in shapes], allowance),
        durable=store is not None,
    )


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


def _whole(loaded: LoadedModel, names: Sequence[str]) -> AbstractContextManager[None]:
    return loaded.widened(names) if isinstance(loaded, StreamedModel) else nullcontext()
