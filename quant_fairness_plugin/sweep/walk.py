"""Runs a state tree on one batch of text: every node once, nodes of equal weights together. Step 4 (sweep).

Takes the model, a `StateTree` and token ids; returns what the head would be given in every state. The model's own
parameters are exchanged by reference and always put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision, StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import Array, Batch, TokenRows, position_limit, sum_rows, tokenize
from quant_fairness_plugin.measure.streamed import Head, score_hidden
from quant_fairness_plugin.model.exchange import exchanged
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import BlockCall, head_input, rehearse
from quant_fairness_plugin.model.streamed import StreamedModel, Table
from quant_fairness_plugin.plans.plan_set import BASELINE
from quant_fairness_plugin.plans.tree import State, StateTree, Variant, build_tree
from quant_fairness_plugin.plans.units import HEAD, UnitMap
from quant_fairness_plugin.sweep.bank import Bank, variant_weights
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT, STACK_TOKENS


@dataclass(slots=True)
class Walk:
    """One batch on its way through the tree."""

    loaded: LoadedModel
    tree: StateTree
    bank: Bank
    ids: Tensor
    mask: Tensor
    calls: tuple[tuple[BlockCall, BlockCall], ...]
    """Per layer what the block is called with for the batch once, and for the batch twice."""
    hidden: list[Tensor]
    """Per node of the stage that was run last, `[rows, tokens, width]`."""
    passes: int = 0
    """Block passes so far, each on one state."""

    def step(self, layer: int) -> None:
        """Run a block for all its nodes."""
        stage = self.tree.stages[layer + 1]
        block = self.loaded.block(layer)
        following: list[Tensor | None] = [None] * len(stage)
        for variant, nodes in self.tree.by_variant(layer + 1).items():
            with exchanged(self.loaded.model, variant_weights(self.bank, variant)):
                for piece in self._pieces(nodes):
                    stacked = torch.cat([self.hidden[stage[node].parent] for node in piece])
                    output = repeated(*self.calls[layer], len(piece)).run(block, stacked)
                    for node, part in zip(piece, torch.split(output, len(self.ids)), strict=True):
                        following[node] = part
            self.passes += len(nodes)
        self.hidden = [found for found in following if found is not None]

    def head_inputs(self) -> Iterator[tuple[int, Variant, Tensor]]:
        """Leaf, what its head is quantized to, and what the head is given, `[rows, tokens, width]`."""
        last = len(self.tree.stages) - 1
        for variant, nodes in self.tree.by_variant(last).items():
            head = tuple(pair for pair in variant if pair[0] == HEAD)
            with exchanged(
                self.loaded.model, variant_weights(self.bank, tuple(pair for pair in variant if pair not in head))
            ):
                for piece in self._pieces(nodes):
                    stacked = torch.cat([self.hidden[self.tree.stages[last][node].parent] for node in piece])
                    ids, mask = self.ids.repeat(len(piece), 1), self.mask.repeat(len(piece), 1)
                    given = head_input(self.loaded, ids, mask, stacked)
                    for node, part in zip(piece, torch.split(given, len(self.ids)), strict=True):
                        yield node, head, part

    def _pieces(self, nodes: Sequence[int]) -> Iterator[Sequence[int]]:
        size = max(1, STACK_TOKENS[self.ids.device.type] // self.ids.numel())
        return (nodes[start : start + size] for start in range(0, len(nodes), size))


@torch.no_grad()
def enter(loaded: LoadedModel, tree: StateTree, bank: Bank, ids: Tensor, mask: Tensor) -> Walk:
    """Bring a batch to the first block, in every variant of what comes before it.

    Args:
        loaded: the model, in evaluation mode.
        tree: the states.
        bank: their weights.
        ids: token ids `[rows, tokens]`, padded on the right.
        mask: 1 where there is a token.
    """
    once = rehearse(loaded, ids, mask)
    twice = rehearse(loaded, ids.repeat(2, 1), mask.repeat(2, 1))
    hidden: list[Tensor] = []
    for node in tree.stages[0]:
        if not node.variant:
            hidden.append(once.hidden)
            continue
        with exchanged(loaded.model, variant_weights(bank, node.variant)):
            hidden.append(rehearse(loaded, ids, mask).hidden)
    return Walk(loaded, tree, bank, ids, mask, tuple(zip(once.calls, twice.calls, strict=True)), hidden)


def repeated(once: BlockCall, twice: BlockCall, copies: int) -> BlockCall:
    """What a block is called with for `copies` copies of a batch, one after another.

    Which arguments have a batch dimension, and of what multiple (BLOOM's ALiBi has rows times heads), is read off the
    calls for one and for two copies: it is the first dimension of every tensor whose size doubles.
    """
    positional = tuple(_tile(a, b, copies) for a, b in zip(once.positional, twice.positional, strict=True))
    return BlockCall(positional, {name: _tile(value, twice.named[name], copies) for name, value in once.named.items()})


def _tile(once: Any, twice: Any, copies: int) -> Any:
    if isinstance(once, tuple):
        return tuple(_tile(a, b, copies) for a, b in zip(once, twice, strict=True))
    if not isinstance(once, Tensor) or once.shape == twice.shape or copies == 1:
        return once
    return once.repeat(copies, *[1] * (once.dim() - 1))


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
