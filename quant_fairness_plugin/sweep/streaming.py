"""Score plans layer by layer: every block is read and quantized once, and all batches go through it before the next.

`walk` holds the whole model; here one block is in memory at a time, so that a model larger than memory can be swept.
What lies between two layers are the hidden states of every batch and prefix (`Stacks`), in memory as far as the budget
goes. `runner` runs the stages for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, StateScores, TextSet, temporary_folder
from quant_fairness_plugin.measure.rows import Batch
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.stacks import Stacks, batches_in_memory
from quant_fairness_plugin.plans.tree import StateTree
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank, BlockBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.jobs import Job
from quant_fairness_plugin.sweep.memory import (
    BATCH_TOKENS,
    HEAD_TOKENS,
    STACK_TOKENS,
    STATES_IN_MEMORY,
    Needs,
    count_needs,
)
from quant_fairness_plugin.sweep.runner import BatchScores, Inputs, TreeRunner, tables_of
from quant_fairness_plugin.sweep.trials import Store, open_store, trial_key
from quant_fairness_plugin.sweep.walk import Progress, add_up, plan_tree, tokenize_texts

LAYERWISE_VERSION = 3
"""Goes up whenever the hidden states or scores of a sweep would come out otherwise."""


@torch.no_grad()
def score_plans_layerwise(
    loaded: LoadedModel,
    plans: Mapping[str, Mapping[str, Precision]],
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    execution: Execution = Execution(),
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, StateScores]:
    """Return the same as `score_plans`, with one block in memory at a time (see `open_streamed`).

    Equal to it up to the order of float32 additions (1e-5 nats a token). Neither the budget nor an interruption
    changes a bit of the result.

    Args:
        loaded: the model; a `StreamedModel` is read block by block, any other is in memory as a whole.
        plans: name → unit → precision; what is not listed is in 16 bit.
        texts: the sentences.
        units: the model's units.
        bank: their weights. It should hold none (`RtnBank(keep=False)`), as what a block needs is held here.
        execution: its `memory_budget`, for all that the sweep holds (see `memory`; None bounds hidden states alone),
            `work` and `prefetch`. `work` keeps the hidden states after every layer, and the scores of finished batches.
        batch_tokens: tokens of a batch.
        progress: called with (block passes done, in all).

    Returns:
        `16 bit` and every plan → its scores.

    Raises:
        ConfigError: a unit that does not exist, or a `work` that is no folder.
        ArtifactError: a block cannot be read, or a plan predicts NaN or infinity.
        ResourceError: the budget is too small, or hidden states cannot be written.
    """
    tree, tokenized = plan_tree(plans, units), tokenize_texts(loaded, texts)
    batches = tokenized.batches(batch_tokens)
    most = max(STACK_TOKENS.on(loaded.model.device.type), *(batch.ids.numel() for batch in batches))
    allowance, budget = STATES_IN_MEMORY, execution.memory_budget
    if budget is not None:
        allowance = sweep_needs(loaded, tree, units, most).left_for_states(budget)
    job, store = Job(loaded, tree, bank, texts, torch.get_num_threads()), None
    if execution.work is not None:
        store = open_store(execution.work, job, layerwise=LAYERWISE_VERSION, batch_tokens=batch_tokens)
    with ExitStack() as resources:
        spill = execution.work or resources.enter_context(temporary_folder())
        stacks = _open_stacks(spill, store, job, batches, allowance)
        block_bank = BlockBank(loaded, units, bank)
        sweep = _Sweep(TreeRunner.of(loaded, tree, block_bank), block_bank, texts, batches, stacks, store, progress)
        results = sweep.run(prefetch=execution.prefetch)
    return add_up(tokenized, tree, batches, results)


@dataclass(slots=True)
class _Sweep:
    """All batches on their way through the model."""

    runner: TreeRunner
    bank: BlockBank
    texts: TextSet
    batches: Sequence[Batch]
    stacks: Stacks
    store: Store | None
    progress: Progress | None
    passes: int = 0
    """Block passes done, each on one state of one batch."""

    def run(self, *, prefetch: bool) -> list[BatchScores]:
        """Return the scores of every batch."""
        stored = [None if self.store is None else self.store.read(batch.rows) for batch in self.batches]
        unfinished = [number for number, scores in enumerate(stored) if scores is None]
        if self.store is not None:  # a run that was stopped right after it had stored scores left the hidden states
            for number in set(range(len(stored))).difference(unfinished):
                self.stacks.drop(number)
        self._enter([number for number in unfinished if self.stacks.stage(number) is None])
        reached = {number: self.stacks.stage(number) or 0 for number in unfinished}
        self._count_before(len(stored) - len(unfinished), reached)
        loaded = self.runner.loaded
        layers = range(min(reached.values(), default=loaded.layers), loaded.layers)
        with block_feed(loaded, layers, prefetch=prefetch) as resident:
            for layer in layers:
                with resident(layer):
                    self._run_layer(layer, [number for number in unfinished if reached[number] <= layer])
        return [self._leave(number) if scores is None else scores for number, scores in enumerate(stored)]

    def _enter(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            with self.stacks.next_stage(number, 0, len(self.runner.tree.stages[0])) as following:
                self.runner.enter(self._inputs(number), following.put)
        self.bank.forget()

    def _run_layer(self, layer: int, numbers: Sequence[int]) -> None:
        nodes = len(self.runner.tree.stages[layer + 1])
        for number in numbers:
            inputs = self._inputs(number)
            # Made again for every layer, as the masks of all batches would be held all the time. It costs a lookup.
            calls = self.runner.calls(inputs)[layer]
            with self.stacks.next_stage(number, layer + 1, nodes) as following:
                self.runner.step(layer, inputs, calls, partial(self.stacks.read, number), following.put)
            self._count(nodes)
        self.bank.forget()

    def _leave(self, number: int) -> BatchScores:
        batch, inputs, read = self.batches[number], self._inputs(number), partial(self.stacks.read, number)
        scores = self.runner.leave(batch, inputs, read, self.texts, together=HEAD_TOKENS // batch.ids.numel())
        if self.store is not None:
            self.store.write(batch.rows, scores)
        self.stacks.drop(number)
        return scores

    def _inputs(self, number: int) -> Inputs:
        return self.runner.inputs(self.batches[number])

    def _count_before(self, finished: int, reached: Mapping[int, int]) -> None:
        """Count what an interrupted sweep has done."""
        tree = self.runner.tree
        passes = finished * tree.block_passes
        passes += sum(len(stage) for stages in reached.values() for stage in tree.stages[1 : stages + 1])
        if passes:
            self._count(passes)

    def _count(self, passes: int) -> None:
        self.passes += passes
        if self.progress is not None:
            self.progress(self.passes, len(self.batches) * self.runner.tree.block_passes)


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


def sweep_needs(loaded: LoadedModel, tree: StateTree, units: UnitMap, tokens: int) -> Needs:
    """Return what a sweep of these states needs at once, beside the hidden states between two layers.

    Args:
        loaded: the model, of which only shapes matter.
        tree: the states.
        units: the model's units.
        tokens: that a block is given at once.
    """
    held = [{precision for node in stage for _, precision in node.variant} for stage in tree.stages[1:-1]]
    around = {unit for stage in (tree.stages[0], tree.stages[-1]) for node in stage for unit, _ in node.variant}
    tables = tables_of(loaded)
    places = {tables[name].place for unit in around for name in units.parameters[unit] if name in tables}
    return count_needs(
        {name: tuple(parameter.shape) for name, parameter in loaded.model.named_parameters()},
        blocks=loaded.family.blocks,
        precisions=max(map(len, held)),
        value_bytes=loaded.model.dtype.itemsize,
        tokens=tokens,
        widened=sum(prod(place.shape) for place in places),
    )
