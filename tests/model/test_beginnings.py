from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from quant_fairness_plugin.artifacts import Start
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import tokenize
from quant_fairness_plugin.model.beginnings import all_beginnings, beginning, find_start
from quant_fairness_plugin.texts.load import load_texts
from tests.model.test_tokenizer import END, LIMIT, PADDING, TEXT, adding
from tests.tiny import byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>{% endfor %}"
)


def other_bos() -> PreTrainedTokenizerFast:
    """A tokenizer of the chat kind: BOS and EOS differ, and it puts nothing in front."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    return tokenizer


def test_a_tokenizer_that_puts_something_in_front_is_taken_at_its_word(tmp_path: Path) -> None:
    tokenizer = adding(tmp_path, [END, END, TEXT, END], truncation=LIMIT, padding=PADDING)
    assert find_start(tokenizer, "auto") == "encoded"
    assert beginning(tokenizer, "auto") == beginning(tokenizer, "encoded") == (0, 0)  # no padding, nothing from behind
    assert beginning(tokenizer, "plain") == ()


def test_a_token_that_is_bos_and_eos_at_once_parts_documents() -> None:
    assert find_start(byte_tokenizer(), "auto") == "eos"
    assert beginning(byte_tokenizer(), "auto") == beginning(byte_tokenizer(), "bos") == (0,)


@pytest.mark.parametrize("tokenizer", [other_bos(), PreTrainedTokenizerFast(tokenizer_object=other_bos()._tokenizer)])
def test_with_another_bos_or_none_text_begins_with_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    assert find_start(tokenizer, "auto") == "plain"
    assert beginning(tokenizer, "auto") == ()


def test_a_chat_begins_as_the_template_says_up_to_the_users_words() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    assert list(beginning(tokenizer, "chat")) == [0, *tokenizer("user\n")["input_ids"]]


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('system first') }}", "{{ messages[0]['content'][::-1] }}", ""]
)
def test_a_template_that_takes_no_user_is_none(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        ConfigError, match="no chat template that takes a user.*accepted here are auto, encoded, bos, eos"
    ):
        beginning(tokenizer, "chat")


def test_every_beginning_is_listed_once_and_the_usual_one_first() -> None:
    assert all_beginnings(byte_tokenizer()) == {"eos": (0,), "plain": ()}
    tokenizer = other_bos()
    tokenizer.chat_template = TEMPLATE
    found = all_beginnings(tokenizer)
    assert list(found) == ["plain", "bos", "eos", "chat"]
    assert found["bos"] == (tokenizer.bos_token_id,)


def test_a_start_that_the_tokenizer_lacks_is_refused_with_those_it_has() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="start 'bos': the tokenizer names no BOS.*are auto, encoded, eos, plain"):
        beginning(tokenizer, "bos")


@pytest.mark.parametrize(("start", "lead"), [("eos", "<|endoftext|>"), ("plain", ""), ("chat", "<|endoftext|>user\n")])
def test_rows_stand_behind_the_beginning_and_score_the_same_text(start: Start, lead: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    texts = replace(load_texts("bundled", languages=["en"]).part("confirm"), start=start)
    ids = tokenizer(lead)["input_ids"]
    for row in tokenize(tokenizer, texts, context=512).rows:
        text = tokenizer(texts.sentences["en"][row.sentence])["input_ids"]
        assert list(row.ids) == [*ids, *text]
        assert row.first == max(1, len(ids))


def test_windows_of_a_long_text_all_stand_behind_the_beginning() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    texts = replace(load_texts("bundled", languages=["en"]).take([0]), start="chat")
    rows, lead = tokenize(tokenizer, texts, context=16).rows, beginning(tokenizer, "chat")
    assert len(rows) > 2
    assert all(row.ids[: len(lead)] == lead for row in rows)
    scored = [token for row in rows for token in row.ids[row.first :]]
    assert scored == tokenizer(texts.sentences["en"][0])["input_ids"]


def test_a_beginning_that_leaves_no_room_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{% for", "x" * 30 + "{% for", 1)
    texts = replace(load_texts("bundled", languages=["en"]), start="chat")
    with pytest.raises(ConfigError, match="puts 36 tokens before every text, and the model takes 64 at once"):
        tokenize(tokenizer, texts, context=64)
