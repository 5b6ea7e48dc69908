"""Answers are the likeliest tokens, one after the other, however many prompts are answered at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from quant_fairness_plugin.answers import ask
from quant_fairness_plugin.answers.ask import write_answers
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.tokenizer import prompt_ids
from tests.tiny import write_tiny_model

PROMPTS = ["a", "one two three", "שלום", "the longest of all these prompts"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<me>{% endif %}"
)


@pytest.fixture(params=["llama", "gpt2", "opt", "bloom"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    write_tiny_model(tmp_path, request.param)
    return load_model(str(tmp_path))


@torch.no_grad()
def naive(loaded: LoadedModel, ids: list[int], new_tokens: int) -> str:
    """A loop over whole texts, without a cache, a mask or padding."""
    row, stop = list(ids), loaded.tokenizer.eos_token_id
    for _ in range(new_tokens):
        row.append(int(loaded.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == stop:
            break
    return str(loaded.tokenizer.decode(row[len(ids) :], skip_special_tokens=True))


def test_prompts_of_all_lengths_together_are_answered_as_each_alone(loaded: LoadedModel) -> None:
    expected = [naive(loaded, prompt_ids(loaded.tokenizer, prompt), 12) for prompt in PROMPTS]
    assert write_answers(loaded.model, loaded.tokenizer, PROMPTS, new_tokens=12) == expected
    assert len(set(expected)) > 1


def test_a_model_that_reads_padding_is_asked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "llama")
    loaded = load_model(str(tmp_path))
    whole = loaded.model.forward

    def without_mask(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return whole(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", without_mask)
    expected = [naive(loaded, prompt_ids(loaded.tokenizer, prompt), 12) for prompt in PROMPTS]
    assert write_answers(loaded.model, loaded.tokenizer, PROMPTS, new_tokens=12) == expected
    monkeypatch.setattr(ask, "_overlooks_padding", lambda *_: True)  # the guard is what this rests on
    assert write_answers(loaded.model, loaded.tokenizer, PROMPTS, new_tokens=12) != expected


def test_a_chat_template_is_used_and_the_models_own_settings_are_neither_used_nor_lost(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    loaded = load_model(str(tmp_path))
    loaded.tokenizer.chat_template = TEMPLATE
    own = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=50.0, eos_token_id=[0])  # type: ignore[no-untyped-call]
    loaded.model.generation_config = own
    ids = loaded.tokenizer("<user>one<me>", add_special_tokens=False)["input_ids"]
    assert write_answers(loaded.model, loaded.tokenizer, ["one"], new_tokens=12) == [naive(loaded, ids, 12)]
    assert loaded.model.generation_config is own


def test_progress_counts_every_step_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path, "llama")
    loaded, seen = load_model(str(tmp_path)), list[tuple[int, int]]()
    monkeypatch.setattr(ask, "BATCH", 2)
    write_answers(loaded.model, loaded.tokenizer, PROMPTS, new_tokens=5, progress=lambda *at: seen.append(at))
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_what_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gpt2")
    loaded = load_model(str(tmp_path))
    write = partial(write_answers, loaded.model, loaded.tokenizer)
    with pytest.raises(ConfigError, match="a prompt of 250 tokens and an answer of 32 are more than the 256 tokens"):
        write(["a" * 250])
