"""Score plans batch by batch, with the whole model in memory: each batch goes through all layers before the next one.

A state tree runs every prefix of precisions once (`plans.tree`); `runner` runs its stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Array, Batch, TokenRows, tokenize_for
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.tree import State, StateTree, build_tree
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT
from quant_fairness_plugin.sweep.runner import BatchScores, TreeRunner

Progress = Callable[[int, int], None]
"""Called with (block passes done, in all)."""


def score_plans(
    loaded: LoadedModel,
    plans: Mapping[str, Mapping[str, Precision]],
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[str, StateScores]:
    """Return the scores of the 16-bit model and of every plan, as `measure.scoring.score_states` gives them.

    Equal to running every plan by itself, up to the order of float32 additions (1e-5 nats a token).

    Args:
        loaded: the model; bit-identical afterwards.
        plans: name → unit → precision; what is not listed is in 16 bit.
        texts: the sentences.
        units: the model's units.
        bank: their weights.
        batch_tokens: tokens of a batch.
        progress: called with (block passes done, in all).

    Returns:
        `16 bit` and every plan → its scores.

    Raises:
        ConfigError: a plan named like the 16-bit state, or a unit that the model does not have.
        ArtifactError: a plan predicts NaN or infinity.
    """
    runner, tokenized = TreeRunner.of(loaded, plan_tree(plans, units), bank), tokenize_texts(loaded, texts)
    batches, passes = tokenized.batches(batch_tokens), runner.tree.block_passes
    results: list[BatchScores] = []
    for number, batch in enumerate(batches):
        counted = None if progress is None else partial(_count_on, progress, number * passes, len(batches) * passes)
        results.append(score_batch(runner, batch, texts, counted))
    return add_up(tokenized, runner.tree, batches, results)


def _count_on(progress: Progress, before: int, total: int, passes: int) -> None:
    progress(before + passes, total)


def plan_tree(plans: Mapping[str, Mapping[str, Precision]], units: UnitMap) -> StateTree:
    """Return the tree of the 16-bit state and all plans."""
    if BASELINE in plans:
        raise ConfigError(f"a plan is named {BASELINE!r}, like the model before quantization; give it another name")
    states = [State(BASELINE, {}), *(State(name, units.expanded(plan)) for name, plan in plans.items())]
    return build_tree(states, units.stages)


def tokenize_texts(loaded: LoadedModel, texts: TextSet) -> TokenRows:
    """Return the sentences as a sweep reads them, cut into windows that the model has positions for."""
    return tokenize_for(loaded.model, loaded.tokenizer, texts, context=CONTEXT)


@torch.no_grad()
def score_batch(
    runner: TreeRunner, batch: Batch, texts: TextSet, counted: Callable[[int], None] | None = None
) -> BatchScores:
    """Return the scores of one batch in every state, layer after layer.

    Args:
        runner: the model and its states.
        batch: padded rows.
        texts: for the names of sentences in errors.
        counted: called with the block passes done after each layer.
    """
    inputs, tree, passes = runner.inputs(batch), runner.tree, 0
    hidden: dict[int, Tensor] = {}
    runner.enter(inputs, hidden.__setitem__)
    for layer, calls in enumerate(runner.calls(inputs)):
        following: dict[int, Tensor] = {}
        runner.step(layer, inputs, calls, hidden.__getitem__, following.__setitem__)
        hidden, passes = following, passes + len(tree.stages[layer + 1])
        if counted is not None:
            counted(passes)
    return runner.leave(batch, inputs, hidden.__getitem__, texts, together=len(tree.stages[-1]))


def add_up(
    tokenized: TokenRows, tree: StateTree, batches: Sequence[Batch], results: Iterable[BatchScores]
) -> dict[str, StateScores]:
    """Return the scores of every state, summed over the batches in their order."""
    totals: dict[str, dict[str, Array]] = {name: tokenized.empty_totals() for name in tree.leaves}
    for batch, result in zip(batches, results, strict=True):
        for name, scores in result.items():
            for row, score in zip(batch.rows, scores, strict=True):
                totals[name][row.language][:, row.sentence] += score
    return {name: tokenized.state_scores(name, sums) for name, sums in totals.items()}
