"""Scores of a set of states on a text set, through the state tree. Step 4 (sweep).

Batches of sentences are the outer loop; a batch is walked once through the tree, and the head is applied to all of its
states together, streamed over the vocabulary. What one batch gives depends on nothing but its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Array, Batch, TokenRows, position_limit, sum_rows, tokenize
from quant_fairness_plugin.measure.streamed import score_hidden
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.limits import BATCH_TOKENS, CONTEXT
from quant_fairness_plugin.sweep.ranking import BASELINE
from quant_fairness_plugin.sweep.residence import find_head
from quant_fairness_plugin.sweep.tree import State, StateTree, Variant, build_tree
from quant_fairness_plugin.sweep.units import UnitMap
from quant_fairness_plugin.sweep.walk import enter


def score_plans(
    loaded: LoadedModel,
    plans: Mapping[str, Mapping[str, Precision]],
    texts: TextSet,
    *,
    units: UnitMap,
    bank: Bank,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StateScores]:
    """Scores of the 16-bit model and of every plan, as `measure.scoring.score_states` gives them.

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
    tokenized = tokenize(loaded.tokenizer, texts, context=min(CONTEXT, position_limit(loaded.model)))
    return score_rows(loaded, plan_tree(plans, units), tokenized, bank=bank, batch_tokens=batch_tokens, report=progress)


def score_rows(
    loaded: LoadedModel,
    tree: StateTree,
    tokenized: TokenRows,
    *,
    bank: Bank,
    batch_tokens: int = BATCH_TOKENS,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, StateScores]:
    """`score_plans` for a tree and sentences that are tokens already."""
    batches = tokenized.batches(batch_tokens)
    totals = {name: tokenized.empty_totals() for name in tree.leaves}
    for number, batch in enumerate(batches):
        counted = _Counter(report or (lambda done, total: None), number, len(batches), tree)
        add_batch(totals, batch, score_batch(loaded, tree, bank, batch, tokenized.texts, counted))
    return finish(tokenized, totals)


def plan_tree(plans: Mapping[str, Mapping[str, Precision]], units: UnitMap) -> StateTree:
    """The tree of the 16-bit state and all plans."""
    if BASELINE in plans:
        raise ConfigError(f"a plan is named {BASELINE!r}, like the model before quantization; give it another name")
    states = [State(BASELINE, {}), *(State(name, units.expanded(plan)) for name, plan in plans.items())]
    return build_tree(states, units.stages)


def add_batch(totals: dict[str, dict[str, Array]], batch: Batch, found: Mapping[str, Array]) -> None:
    """Add the rows of a batch to the totals of every state."""
    for name, scores in found.items():
        for row, score in zip(batch.rows, scores, strict=True):
            totals[name][row.language][:, row.sentence] += score


def finish(tokenized: TokenRows, totals: Mapping[str, dict[str, Array]]) -> dict[str, StateScores]:
    """The totals of all batches as scores."""
    return {name: tokenized.state_scores(name, found) for name, found in totals.items()}


@torch.no_grad()
def score_batch(
    loaded: LoadedModel,
    tree: StateTree,
    bank: Bank,
    batch: Batch,
    texts: TextSet,
    counted: Callable[[int], None],
) -> dict[str, Array]:
    """State → NLL, KL and flips of each row, `[rows, 3]`.

    Args:
        loaded: the model.
        tree: the states.
        bank: their weights.
        batch: padded rows.
        texts: for the names of sentences in errors.
        counted: called with the block passes done after each layer.
    """
    walk = enter(loaded, tree, bank, batch.ids.to(loaded.model.device), batch.mask.to(loaded.model.device))
    for layer in range(loaded.layers):
        walk.step(layer)
        counted(walk.passes)
    given: dict[int, Tensor] = {}
    heads: dict[int, Variant] = {}
    for leaf, head, hidden in walk.head_inputs():
        given[leaf] = hidden.flatten(0, 1)[batch.positions.to(hidden.device)]
        heads[leaf] = head
    return _score_leaves(loaded, tree, bank, batch, texts, given, heads)


def _score_leaves(
    loaded: LoadedModel,
    tree: StateTree,
    bank: Bank,
    batch: Batch,
    texts: TextSet,
    given: dict[int, Tensor],
    heads: dict[int, Variant],
) -> dict[str, Array]:
    reference = given[tree.leaves[BASELINE]]
    own = find_head(loaded, bank, ())
    targets = batch.targets.to(reference.device)
    per_leaf: dict[int, Tensor] = {}
    baseline = torch.zeros(len(targets), 3, dtype=torch.float64)
    for variant in dict.fromkeys(heads.values()):
        leaves = [leaf for leaf in given if heads[leaf] == variant]
        hidden = torch.stack([given[leaf] for leaf in leaves])
        nll, scores = score_hidden(
            reference, hidden, targets, own, state_head=find_head(loaded, bank, variant) if variant else None
        )
        baseline[:, 0] = nll.cpu()
        per_leaf |= dict(zip(leaves, scores.cpu(), strict=True))
    # A state that is the 16-bit model itself has no KL; rounding would give it one of about 1e-7.
    per_leaf[tree.leaves[BASELINE]] = baseline
    return {name: sum_rows(batch, per_leaf[leaf], name, texts) for name, leaf in tree.leaves.items()}


class _Counter:
    """Turns the block passes of one batch into progress over all batches."""

    def __init__(self, report: Callable[[int, int], None], number: int, batches: int, tree: StateTree) -> None:
        self._report, self._before, self._total = report, number * tree.block_passes, batches * tree.block_passes

    def __call__(self, passes: int) -> None:
        self._report(self._before + passes, self._total)
