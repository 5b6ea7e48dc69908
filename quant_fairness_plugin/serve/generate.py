"""Text out of a model, piece by piece, and how fast it came."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.measure.rows import embedding_rows
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.load import quiet_transformers
from quant_fairness_plugin.model.tokenizer import check_ids, prompt_ids
from quant_fairness_plugin.serve.decode import greedy_tokens

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote, and when."""

    text: str
    """The continuation, without the prompt and without special tokens."""
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Until the first new token."""
    decode_seconds: float
    """From the first new token to the last."""

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of the tokens after the first, which the prompt's length does not enter; None if there are none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; runs no code from it.

    Raises:
        ArtifactError: the folder has none that loads.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as err:
        reason = " ".join(str(err).split())[:200]
        raise ArtifactError(f"{folder}: the tokenizer does not load ({reason}). Put its files there.") from err
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    write: Callable[[str], object] | None = None,
) -> Generated:
    """Continue a prompt greedily, which is deterministic. The prompt is taken as it is, without a chat template.

    Of what the tokenizer adds, only what stands in front is used: an EOS behind the prompt would end the text.
    The likeliest token is taken as it is: penalties of the generation config are not applied, and the log says so.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: at least one token.
        max_new_tokens: where to stop, unless the model ends the text before.
        write: gets each piece of text as soon as later tokens cannot change it.

    Raises:
        ConfigError: nothing to continue, no tokens wanted, or more of both than the model has positions for.
        ArtifactError: the prompt has a token that the model has no embedding for.
    """
    tokens = prompt_ids(tokenizer, prompt)
    _check_lengths(model, len(tokens), max_new_tokens)
    check_ids(tokenizer, tokens, rows=embedding_rows(model), name="the prompt")
    _warn_of_penalties(model)
    start = torch.tensor([tokens], device=model.device)
    streamer = _Writer(tokenizer, write)
    times, new = [time.perf_counter()], list[int]()
    with quiet_transformers():
        for token in greedy_tokens(model, start, max_new_tokens=max_new_tokens, stops=_stops(model)):
            times.append(time.perf_counter())
            new.append(token)
            streamer.put(torch.tensor([token]))  # type: ignore[no-untyped-call] # Transformers has no types here
    streamer.end()  # type: ignore[no-untyped-call]
    return Generated(
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        prompt_tokens=len(tokens),
        new_tokens=len(new),
        prefill_seconds=times[1] - times[0],
        decode_seconds=times[-1] - times[1],
    )


class _Writer(TextStreamer):
    """Hands text on as soon as later tokens cannot change it."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._write is not None and text:
            self._write(text)


def _stops(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text: one, several, or none."""
    ends: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))


def _warn_of_penalties(model: PreTrainedModel) -> None:
    settings: Any = model.generation_config
    penalty = getattr(settings, "repetition_penalty", None)
    if penalty not in (None, 1.0):
        _logger.warning(
            "the generation config's repetition_penalty %s is not applied: decoding is plain greedy", penalty
        )


def _check_lengths(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"{max_new_tokens} new tokens cannot be generated; ask for at least 1.")
    if prompt_tokens < 1:
        raise ConfigError("the prompt is empty; give at least one character to continue.")
    positions = longest_input(model.config.to_dict())
    if prompt_tokens + max_new_tokens > positions:
        raise ConfigError(
            f"{prompt_tokens} tokens of the prompt and {max_new_tokens} new ones are more than the model's {positions} "
            "positions. Ask for fewer, or shorten the prompt."
        )
