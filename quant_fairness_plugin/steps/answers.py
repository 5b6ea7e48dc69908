"""Prompts: what a checkpoint writes in each language beside the 16-bit model, or why neither was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from quant_fairness_plugin.answers.ask import write_answers
from quant_fairness_plugin.answers.check import has_chat_template
from quant_fairness_plugin.answers.faults import find_faults
from quant_fairness_plugin.answers.prompts import NEW_TOKENS, Prompts, load_prompts
from quant_fairness_plugin.artifacts import Answer, Answers, LanguageAnswers, Measurement, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.measure.scoring import ModelState, block_state
from quant_fairness_plugin.model.freed import return_what_is_free
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.on_call import read_on_call
from quant_fairness_plugin.model.sizes import shown
from quant_fairness_plugin.model.streamed import StreamedModel, budget_of

FLOAT32_BYTES = 4
EXPECTED_TOKENS = 64 + NEW_TOKENS
"""Of a prompt in its chat template and its answer, to tell what the model remembers of them."""
BUDGET_SHARE = 0.25
"""Of a memory budget that this may take."""
_logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
"""Called with (step, done, in all)."""


def ask(
    loaded: LoadedModel,
    folder: Path,
    state: ModelState,
    measurement: Measurement,
    config: FairConfig,
    *,
    progress: Progress,
) -> Answers | Undefined:
    """Put the prompts to the 16-bit model and to a checkpoint, in the languages that the 16-bit model knows.

    Where the 16-bit model is read block by block, the prompts are answered so, too: all together, since every token
    takes a pass over the files.

    Args:
        loaded: the 16-bit model.
        folder: the checkpoint.
        state: the checkpoint as it was measured.
        measurement: says which languages the 16-bit model knows.
        config: names the prompts.
        progress: called with (step, tokens so far, in all).
    """
    prompts = load_prompts(config.prompts)
    if prompts is None:
        return Undefined("--prompts none")
    known = [row.language for row in measurement.languages if row.status != "unsupported"]
    if not known:
        return Undefined("the 16-bit model knows none of these languages")
    chat = has_chat_template(loaded.tokenizer)
    texts = {language: prompts.of(language, chat=chat) for language in known}
    if not any(texts.values()):
        return Undefined(f"{prompts.source} has no prompt in {', '.join(known)}")
    if reason := _over_budget(loaded, sum(map(len, texts.values()))):
        return Undefined(reason)
    try:
        dtype, before = _ask_16_bit(loaded, texts, partial(progress, "answers of the 16-bit model"))
        after = _written(state, loaded, texts, partial(progress, "answers of the checkpoint"))
    except Exception as err:  # noqa: BLE001 - whatever a model's way to write fails of, hours of work are in the result
        kind = "" if isinstance(err, QuantFairnessError) else f"{type(err).__name__}: "
        said = kind + " ".join(str(err).split())[:200]
        _logger.warning("the checkpoint of %s was asked no prompts: %s", loaded.files.name, said)
        return Undefined(said)
    return Answers(
        source=prompts.source,
        chat_template=chat,
        new_tokens=NEW_TOKENS,
        dtype=dtype,
        languages=tuple(_compared(name, texts[name], before[name], after[name]) for name in known if texts[name]),
        not_asked=_not_asked(measurement, texts, prompts),
    )


def _over_budget(loaded: LoadedModel, rows: int) -> str:
    """Return why a stated memory budget does not hold what the model remembers of the prompts; empty where it does."""
    budget = budget_of(loaded)
    if budget is None:
        return ""
    width = loaded.model.config.get_text_config().hidden_size
    cached = rows * EXPECTED_TOKENS * 2 * loaded.layers * width * FLOAT32_BYTES  # keys and values, at most
    if cached <= BUDGET_SHARE * budget:
        return ""
    advice = "quant-fairness measure DIR asks without one"
    return (
        f"keys and values of {rows} prompts take up to {shown(cached)} of the memory budget, {shown(budget)}; {advice}"
    )


def _ask_16_bit(
    loaded: LoadedModel, texts: Mapping[str, tuple[str, ...]], progress: Callable[[int, int], None]
) -> tuple[str, dict[str, list[str]]]:
    """Return what the 16-bit model computes in, and its answers."""
    state = block_state("16 bit", loaded)
    return str(loaded.model.dtype).removeprefix("torch."), _written(state, loaded, texts, progress)


def _written(
    state: ModelState,
    loaded: LoadedModel,
    texts: Mapping[str, tuple[str, ...]],
    progress: Callable[[int, int], None],
) -> dict[str, list[str]]:
    """Return the answers of a model by language, in the order of the prompts."""
    flat = [text for rows in texts.values() for text in rows]
    streamed = state.blocks if isinstance(state.blocks, StreamedModel) else None
    on_call = nullcontext() if streamed is None else read_on_call(streamed)
    return_what_is_free()
    with state.applied() as model, on_call:
        written = iter(write_answers(model, loaded.tokenizer, flat, together=streamed is not None, progress=progress))
    return {language: [next(written) for _ in rows] for language, rows in texts.items()}


def _compared(language: str, prompts: tuple[str, ...], before: list[str], after: list[str]) -> LanguageAnswers:
    return LanguageAnswers(
        language=language,
        answers=tuple(
            Answer(
                prompt=prompt,
                sixteen_bit=old,
                checkpoint=new,
                sixteen_bit_faults=find_faults(old, prompts),
                checkpoint_faults=find_faults(new, prompts),
            )
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ),
    )


def _not_asked(measurement: Measurement, texts: Mapping[str, tuple[str, ...]], prompts: Prompts) -> dict[str, str]:
    """Return the measured languages that were not asked, with the reason."""
    left_out = (row.language for row in measurement.languages if not texts.get(row.language))
    return {
        language: f"{prompts.source} has no prompt in it" if language in texts else "the 16-bit model does not know it"
        for language in left_out
    }
