"""Greedy text equals a loop over logits, arrives in pieces that add up, and is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.serve.generate import Generated, generate_text, load_tokenizer
from quant_fairness_plugin.serve.load import load_quantized
from tests.serve.conftest import Served

PROMPT = "one two"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_text_is_that_of_a_loop_over_logits(served: Served, family: str) -> None:
    model, tokenizer = load_quantized(served(family), kernel="reference"), load_tokenizer(served(family))
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    row = tokens
    for _ in range(12):
        row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], dim=1)
        if int(row[0, -1]) == tokenizer.eos_token_id:
            break
    pieces: list[str] = []
    done = generate_text(model, tokenizer, PROMPT, max_new_tokens=12, write=pieces.append)
    assert done.text == tokenizer.decode(row[0, tokens.shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == done.text
    assert (done.prompt_tokens, done.new_tokens) == (tokens.shape[1], row.shape[1] - tokens.shape[1])
    assert done.prefill_seconds > 0
    assert done.tokens_per_second == (done.new_tokens - 1) / done.decode_seconds


def test_one_token_has_no_rate(served: Served) -> None:
    model, tokenizer = load_quantized(served("llama")), load_tokenizer(served("llama"))
    done = generate_text(model, tokenizer, PROMPT, max_new_tokens=1)
    assert done.new_tokens == 1
    assert done.tokens_per_second is None


def test_the_rate_leaves_the_prompt_out() -> None:
    assert Generated("x", 100, 11, prefill_seconds=50.0, decode_seconds=2.0).tokens_per_second == 5.0


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ("", 5, "the prompt is empty"),
        ("a", 0, "0 new tokens cannot be generated"),
        ("a" * 250, 7, "250 tokens of the prompt and 7 new ones are more than the model's 256 positions"),
    ],
)
def test_what_cannot_be_continued_is_refused(served: Served, prompt: str, tokens: int, message: str) -> None:
    model, tokenizer = load_quantized(served("llama")), load_tokenizer(served("llama"))
    with pytest.raises(ConfigError, match=message):
        generate_text(model, tokenizer, prompt, max_new_tokens=tokens)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the tokenizer does not load"):
        load_tokenizer(tmp_path)


def test_an_eos_behind_the_prompt_is_left_out(served: Served) -> None:
    model, tokenizer = load_quantized(served("llama"), kernel="reference"), load_tokenizer(served("llama"))
    expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=12)
    end = str(tokenizer.eos_token)
    tokenizer._tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer(PROMPT)["input_ids"][-1] == tokenizer.eos_token_id
    done = generate_text(model, tokenizer, PROMPT, max_new_tokens=12)
    assert (done.text, done.prompt_tokens) == (expected.text, expected.prompt_tokens)


def test_a_prompt_with_a_token_outside_of_the_embedding_is_refused(served: Served) -> None:
    model, tokenizer = load_quantized(served("llama")), load_tokenizer(served("llama"))
    tokenizer.add_tokens([f"<{index}>" for index in range(20)])
    with pytest.raises(ArtifactError, match="the prompt: the tokenizer gives '<19>' the id 276, .* has 264 rows"):
        generate_text(model, tokenizer, "one <19>", max_new_tokens=1)
