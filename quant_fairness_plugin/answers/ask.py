"""Let a model write: prompts in, the likeliest continuation of each out, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from quant_fairness_plugin.answers.check import encode_prompt
from quant_fairness_plugin.answers.prompts import NEW_TOKENS
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.rows import embedding_rows, position_limit
from quant_fairness_plugin.model.quiet import quiet_transformers
from quant_fairness_plugin.model.tokenizer import check_ids

BATCH = 24
"""Prompts that are answered at once."""
SAME_LOGITS = 0.05
"""Largest change of a logit by padding, over the largest logit: room for 16-bit arithmetic. A model that reads padding
as text changes them by about 1."""
Progress = Callable[[int, int], None]
"""Called with (tokens that were asked for so far, in all)."""


@torch.no_grad()
def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int = NEW_TOKENS,
    together: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Return what a model writes after each prompt, greedily, without the prompt and without special tokens.

    Where the tokenizer has a chat template, a prompt is what the user says in it; else it is a text to go on with.
    Prompts of different lengths are padded in front and answered together, if the model overlooks the padding, which
    is tried; else one by one.

    Args:
        model: in evaluation mode; not changed.
        tokenizer: the model's.
        prompts: at least one character each.
        new_tokens: where an answer stops, unless the model ends it before.
        together: answer all prompts in as few passes as one takes, or none.
        progress: called after every step.

    Raises:
        UnsupportedModelError: prompts cannot be answered together.
        ConfigError: a prompt and its answer have more tokens than the model takes.
        ArtifactError: a prompt has a token that the model has no embedding for.
    """
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check(model, tokenizer, rows, new_tokens)
    with _plain_greedy(model, tokenizer, new_tokens), quiet_transformers():
        size = _rows_at_once(model, rows, together=together)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers: list[str] = []
        for number, batch in enumerate(batches):
            count = _Count(number * new_tokens, len(batches) * new_tokens, progress)
            ids, mask = _padded(batch, model)
            written = _generate(model)(input_ids=ids, attention_mask=mask, stopping_criteria=[count])
            answers += tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            count.finish(new_tokens)
    return answers


def _rows_at_once(model: PreTrainedModel, rows: Sequence[Sequence[int]], *, together: bool) -> int:
    if _overlooks_padding(model, rows):
        return len(rows) if together else BATCH
    if together:
        raise UnsupportedModelError(
            f"the model reads padding as text: {len(rows)} prompts cannot be answered together, and one by one each "
            "would take its own passes over the files"
        )
    return 1


def _check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], new_tokens: int
) -> None:
    longest, limit = max(map(len, rows)), position_limit(model)
    if longest + new_tokens > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and an answer of {new_tokens} are more than the {limit} tokens that the "
            "model takes; ask shorter ones with --prompts FILE"
        )
    for row in rows:
        check_ids(tokenizer, row, rows=embedding_rows(model), name="a prompt")


@contextmanager
def _plain_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> Iterator[None]:
    """Let `generate` take the likeliest token and nothing else; the model's own settings are put back afterwards."""
    own: Any = model.generation_config
    ends = getattr(own, "eos_token_id", None)
    first = ends[0] if isinstance(ends, list) else ends
    padding = next((token for token in (tokenizer.pad_token_id, first) if token is not None), 0)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call] # Transformers has no types here
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=padding
    )
    try:
        yield
    finally:
        model.generation_config = own


def _overlooks_padding(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> bool:
    """Return whether the shortest row has the same next token with padding in front, beside the longest, as alone."""
    shortest, longest = min(rows, key=len), max(rows, key=len)
    if len(shortest) == len(longest):
        return True
    alone, beside = (_first_logits(model, batch)[0] for batch in ([shortest], [shortest, longest]))
    return float((alone - beside).abs().max()) <= SAME_LOGITS * float(alone.abs().max())


def _first_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    ids, mask = _padded(rows, model)
    made = _generate(model)(
        input_ids=ids, attention_mask=mask, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    logits: Tensor = made.logits[0].float()
    return logits


def _padded(rows: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, `[rows, longest]`, with padding in front."""
    settings: Any = model.generation_config
    longest = max(map(len, rows))
    ids = [[settings.pad_token_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)


def _generate(model: PreTrainedModel) -> Any:
    generate: Any = model.generate  # Transformers types it by a protocol that its models do not fit
    return generate


class _Count(StoppingCriteria):
    """Stops nothing: it is told of every step."""

    def __init__(self, before: int, total: int, progress: Progress | None) -> None:
        self._done, self._before, self._total, self._progress = before, before, total, progress
        self._tell()

    def __call__(self, input_ids: Tensor, scores: Any, **_: object) -> Any:
        self._done += 1
        self._tell()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self, new_tokens: int) -> None:
        """Count a batch as done, however early its answers ended."""
        self._done = self._before + new_tokens
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
