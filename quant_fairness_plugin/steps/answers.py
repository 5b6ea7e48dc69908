"""Prompts: what a checkpoint writes in each language beside the 16-bit model, or why neither was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from quant_fairness_plugin.answers.ask import NEW_TOKENS, has_chat_template, write_answers
from quant_fairness_plugin.answers.faults import find_faults
from quant_fairness_plugin.answers.prompts import Prompts, load_prompts
from quant_fairness_plugin.artifacts import Answer, Answers, LanguageAnswers, Measurement, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.measure.scoring import ModelState
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.sizes import shown
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.steps.checkpoints import whole_checkpoint
from quant_fairness_plugin.sweep.executors import machine_memory

FLOAT32_BYTES = 4
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

    Models that are read block by block are loaded as a whole for this, one after the other: block by block, every token
    would take a pass over the files. They are not asked where that would not fit, or a memory budget was stated.

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
    if reason := _too_large(loaded):
        return Undefined(reason)
    try:
        dtype, before = _ask_16_bit(loaded, texts, partial(progress, "answers of the 16-bit model"))
        after = _ask_checkpoint(folder, state, loaded, texts, partial(progress, "answers of the checkpoint"))
    except Exception as err:  # noqa: BLE001 - whatever a model's way to write fails of, hours of work are in the result
        said = " ".join(str(err).split())[:200]
        _logger.warning("%s was asked no prompts: %s: %s", folder, type(err).__name__, said)
        return Undefined(f"{type(err).__name__}: {said}")
    return Answers(
        source=prompts.source,
        chat_template=chat,
        new_tokens=NEW_TOKENS,
        dtype=dtype,
        languages=tuple(_compared(name, texts[name], before[name], after[name]) for name in known if texts[name]),
        not_asked=_not_asked(measurement, texts, prompts),
    )


def _too_large(loaded: LoadedModel) -> str:
    """Return why a model that is read block by block cannot be asked; empty where it can."""
    if not isinstance(loaded, StreamedModel):
        return ""
    advice = "quant-fairness measure DIR asks where there is the memory"
    needed = loaded.parameters * FLOAT32_BYTES  # which the checkpoint is dequantized to
    if loaded.memory_budget is not None:
        return f"within a memory budget the model is read layer by layer, which every word would take again; {advice}"
    if 2 * needed > machine_memory():
        return f"the whole model takes {shown(needed)} of {shown(machine_memory())} of memory; {advice}"
    return ""


def _ask_16_bit(
    loaded: LoadedModel, texts: Mapping[str, tuple[str, ...]], progress: Callable[[int, int], None]
) -> tuple[str, dict[str, list[str]]]:
    """Return what the 16-bit model computes in, and its answers. Alone, so that a model loaded for them is let go."""
    with _whole(loaded) as model:
        return str(model.dtype).removeprefix("torch."), _written(model, loaded, texts, progress)


def _ask_checkpoint(
    folder: Path,
    state: ModelState,
    loaded: LoadedModel,
    texts: Mapping[str, tuple[str, ...]],
    progress: Callable[[int, int], None],
) -> dict[str, list[str]]:
    with _whole_checkpoint(folder, state, loaded) as model:
        return _written(model, loaded, texts, progress)


@contextmanager
def _whole(loaded: LoadedModel) -> Iterator[PreTrainedModel]:
    if not isinstance(loaded, StreamedModel):
        yield loaded.model
        return
    yield load_model(
        loaded.files,
        dtype=loaded.compute,
        trust_remote_code=loaded.files.runs_code,
        device=str(loaded.model.device),
        storage=loaded.storage_dtype,
    ).model


@contextmanager
def _whole_checkpoint(folder: Path, state: ModelState, loaded: LoadedModel) -> Iterator[PreTrainedModel]:
    if state.blocks is None:
        with state.applied() as model:
            yield model
        return
    yield whole_checkpoint(folder, loaded)


def _written(
    model: PreTrainedModel,
    loaded: LoadedModel,
    texts: Mapping[str, tuple[str, ...]],
    progress: Callable[[int, int], None],
) -> dict[str, list[str]]:
    """Return the answers of a model by language, in the order of the prompts."""
    flat = [text for rows in texts.values() for text in rows]
    written = iter(write_answers(model, loaded.tokenizer, flat, progress=progress))
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
