"""Per-sentence scores of model states; the only module of this package that runs whole models.

Takes model states and a `TextSet`; returns `StateScores`: negative log-likelihood, KL to the first state over the full
vocabulary and top-1 flips of every sentence. A state is run up to its head; the heads of all states are then applied to
a batch together, a piece of the vocabulary at a time (`streamed`), so that no distribution over it is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import StateScores, TextSet
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.layers import HeadInputs
from quant_fairness_plugin.measure.rows import Batch, sum_rows, tokenize_for
from quant_fairness_plugin.measure.streamed import FileHead, Head, score_hidden
from quant_fairness_plugin.model.context import SMALLEST_CONTEXT
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import EnoughError, logit_rule, model_logit_rule
from quant_fairness_plugin.model.streamed import StreamedModel


class ModelState(NamedTuple):
    """A named variant of a model. Entering `applied()` yields the model to run; leaving it restores what was there."""

    name: str
    applied: Callable[[], AbstractContextManager[PreTrainedModel]]
    blocks: LoadedModel | None = None
    """Where it is to be run block by block: the model, which is then not applied but for its vocabulary."""
    kept: Path | None = None
    """Block by block: a folder that keeps what the head is given, for the next time; None keeps nothing."""


def fixed_state(name: str, model: PreTrainedModel) -> ModelState:
    """Return the state of a model that is used as it is: the 16-bit model, or an export that was loaded."""
    return ModelState(name, lambda: nullcontext(model))


def block_state(name: str, loaded: LoadedModel, *, kept: Path | None = None) -> ModelState:
    """Return the state of a model as it is; block by block where its blocks are in files (see `ModelState`)."""
    return ModelState(
        name, lambda: nullcontext(loaded.model), loaded if isinstance(loaded, StreamedModel) else None, kept
    )


def score_states(
    states: Sequence[ModelState],
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    *,
    batch_tokens: int = 2048,
    context: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StateScores]:
    """Score every state on every sentence, sentences in the order of the text set.

    Each token is scored once, given the beginning that the text set asks for and the text before it; where nothing
    stands in front, the first token and its bytes are left out. A sentence longer than the context is read in windows
    that overlap by half.
    Numbers have the 7 significant digits that float32 arithmetic can vouch for.

    Args:
        states: the 16-bit model first: KL and flips of the others are measured against it.
        tokenizer: of all states.
        texts: sentences to score; take a part of a text set with `TextSet.part`.
        batch_tokens: tokens in a batch, padding included; a longer sentence makes a batch alone.
        context: longest window in tokens, beginning included (the model's limit where that is less).
        progress: called with (done, total) batches times states.

    Raises:
        ConfigError: no state, two of one name, a limit too small, or a sentence without a token to score.
        UnsupportedModelError: nothing in front and no character offsets; or states of different vocabularies.
        ArtifactError: a state predicts NaN or infinity, or a token has no embedding.
    """
    _check_arguments(states, batch_tokens, context)
    with states[0].applied() as model:
        tokenized = tokenize_for(model, tokenizer, texts, context=context)
    batches = tokenized.batches(batch_tokens)
    totals = {state.name: tokenized.empty_totals() for state in states}
    done, total = 0, len(batches) * len(states)

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with ExitStack() as resources:
        runs = _with_common_head([_Run.of(state, batches, count, resources) for state in states])
        for number, batch in enumerate(batches):
            for name, per_token in zip(totals, _score_batch(runs, number, batch), strict=True):
                for row, score in zip(batch.rows, sum_rows(batch, per_token, name, texts), strict=True):
                    totals[name][row.language][:, row.sentence] += score
    return {name: tokenized.state_scores(name, sums) for name, sums in totals.items()}


def _check_arguments(states: Sequence[ModelState], batch_tokens: int, context: int) -> None:
    names = [state.name for state in states]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"states {names}: give at least one, the 16-bit model first, no two of one name")
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: a batch needs at least 1 token; the default is 2048")
    if context < SMALLEST_CONTEXT:
        raise ConfigError(f"context={context}: a window needs at least {SMALLEST_CONTEXT} tokens; the default is 2048")


@dataclass(frozen=True, slots=True)
class _Run:
    """A state that is being scored."""

    state: ModelState
    head: Head
    inputs: Callable[[int], Tensor]
    """Batch → what the head is given where a token is predicted, `[targets, width]`."""

    @classmethod
    def of(cls, state: ModelState, batches: Sequence[Batch], count: Callable[[], None], resources: ExitStack) -> _Run:
        """Return a run of a state; where it goes block by block, all batches are run now."""
        if state.blocks is not None:
            kept = HeadInputs(state.blocks, batches, state.kept)
            resources.callback(kept.close)
            kept.run(count)
            return cls(state, find_head(state.blocks), kept.read)

        def run(number: int) -> Tensor:
            with state.applied() as model:
                inputs = _head_inputs(model, batches[number], state.name)
            count()
            return inputs

        with state.applied() as model:
            return cls(state, _output_head(model), run)


def find_head(loaded: LoadedModel) -> Head:
    """Return a model's output head, which stays in its file where the model's tables do."""
    module = loaded.model.get_submodule(loaded.family.head)
    table = loaded.tables.get(f"{loaded.family.head}.weight") if isinstance(loaded, StreamedModel) else None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    rule = logit_rule(loaded)
    return Head(weight, bias, rule) if table is None else FileHead(weight, bias, rule, table=table)


def _output_head(model: PreTrainedModel) -> Head:
    module = _head_module(model)
    # Detached, a weight stays what it is now, when the state that put it there is left.
    weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
    return Head(weight, None if bias is None else bias.detach(), model_logit_rule(model, module))


def _head_module(model: PreTrainedModel) -> nn.Module:
    module: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return module


def _with_common_head(runs: Sequence[_Run]) -> list[_Run]:
    """Return the runs with the first one's head wherever theirs has the same values: it is then applied to all at once.

    Raises:
        UnsupportedModelError: a head with another number of tokens.
    """
    first, *others = runs
    for run in others:
        sizes = len(run.head.weight), len(first.head.weight)
        if sizes[0] != sizes[1]:
            raise UnsupportedModelError(
                f"state {run.state.name!r} has {sizes[0]} logits and {first.state.name!r} {sizes[1]}: "
                "their distributions cannot be compared; score variants of one model"
            )
    return [first, *(replace(run, head=first.head) if run.head.equals(first.head) else run for run in others)]


def _score_batch(runs: Sequence[_Run], number: int, batch: Batch) -> list[Tensor]:
    """Each state's NLL, KL and flips on a batch, `[targets, 3]`; all states with the first one's head at once."""
    first, *others = runs
    reference = first.inputs(number)
    given = [run.inputs(number).to(reference.device) for run in others]
    targets = batch.targets.to(reference.device)
    alone = [index for index, run in enumerate(others) if run.head is not first.head]
    together = [index for index in range(len(others)) if index not in alone]
    scores: dict[int, Tensor] = {}
    nll = None
    for indices, head in [(together, None), *(([index], others[index].head) for index in alone)]:
        if indices or not others:
            states = [given[index][None] for index in indices]
            stacked = torch.cat([reference[None][:0], *states])
            nll, scored = score_hidden(reference, stacked, targets, first.head, state_head=head)
            scores |= dict(zip(indices, scored.cpu(), strict=True))
    assert nll is not None
    baseline = torch.zeros(len(targets), 3, dtype=torch.float64)
    baseline[:, 0] = nll.cpu()
    return [baseline, *(scores[index] for index in range(len(others)))]


@torch.no_grad()
def _head_inputs(model: PreTrainedModel, batch: Batch, name: str) -> Tensor:
    """What the head of a model is given where a token is predicted, `[targets, width]`."""
    if model.training:
        raise ConfigError(f"state {name!r} is in training mode, where dropout makes scores random; call model.eval()")
    inputs: list[Tensor] = []

    def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
        inputs.append(positional[0])
        raise EnoughError

    handle = _head_module(model).register_forward_pre_hook(note)
    try:
        with suppress(EnoughError):
            model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return inputs[0].flatten(0, 1)[batch.positions.to(inputs[0].device)]
