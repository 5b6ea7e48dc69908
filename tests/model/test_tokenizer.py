from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.measure.rows import tokenize
from quant_fairness_plugin.model.beginnings import all_beginnings
from quant_fairness_plugin.model.resolve import BUNDLED, resolve_model
from quant_fairness_plugin.model.tokenizer import (
    QuickTokenizer,
    check_vocabulary,
    counting_tokenizer,
    prompt_ids,
    stored_embedding_rows,
    text_ids,
)
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.texts.load import load_texts
from tests.tiny import END_OF_TEXT, VOCABULARY, byte_tokenizer, write_tiny_model


@pytest.mark.parametrize("name", BUNDLED)
def test_quick_ids_are_those_of_the_models_own_tokenizer(name: str) -> None:
    files, texts = resolve_model(name), load_texts("bundled").part("calibrate")
    quick, own = counting_tokenizer(files), AutoTokenizer.from_pretrained(files.folder)
    assert isinstance(quick, QuickTokenizer)
    rows = [tokenize(tokenizer, texts, context=64).rows for tokenizer in (quick, own)]  # type: ignore[arg-type]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("changes", [{"add_prefix_space": True}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_settings_that_could_change_ids_take_the_models_own(changes: dict[str, object], tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    assert not isinstance(counting_tokenizer(resolve_model(str(tmp_path))), QuickTokenizer)


def test_added_tokens_that_are_not_in_the_file_take_the_models_own(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    path = tmp_path / "tokenizer_config.json"
    added = {"added_tokens_decoder": {"300": {"content": "<new>", "special": True}}}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | added), encoding="utf-8")
    assert not isinstance(counting_tokenizer(resolve_model(str(tmp_path))), QuickTokenizer)


def test_a_broken_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="tokenizer does not load"):
        counting_tokenizer(resolve_model(str(tmp_path)))


END = {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
LIMIT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": END_OF_TEXT,
}  # fmt: skip


def adding(folder: Path, single: list[object], **changes: object) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a post-processor and further settings in its file."""
    byte_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    special = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}}
    pair = [TEXT, {"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    content = json.loads(path.read_text(encoding="utf-8")) | {"post_processor": template} | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.mark.parametrize(
    ("single", "front"), [([TEXT], 0), ([TEXT, END], 0), ([END, TEXT, END], 1), ([END, TEXT], 1), ([TEXT, END, END], 0)]
)
def test_a_prompt_keeps_what_is_added_in_front_and_nothing_behind(
    single: list[object], front: int, tmp_path: Path
) -> None:
    plain, tokenizer = byte_tokenizer(), adding(tmp_path, single, truncation=LIMIT, padding=PADDING)
    text = "In the beginning"
    assert prompt_ids(tokenizer, text) == [0] * front + plain(text)["input_ids"]
    assert prompt_ids(tokenizer, "") == [0] * front
    assert prompt_ids(tokenizer, text + END_OF_TEXT)[-1] == 0  # what the prompt itself says stays


def test_texts_and_calibration_rows_are_those_of_the_unchanged_tokenizer(tmp_path: Path) -> None:
    tokenizer = adding(tmp_path, [END, TEXT, END], truncation=LIMIT, padding=PADDING)
    texts = load_texts("bundled", languages=["en", "he"]).part("calibrate")
    sentences = texts.sentences["he"]
    assert text_ids(tokenizer, sentences)["input_ids"] == text_ids(byte_tokenizer(), sentences)["input_ids"]
    rows = [build_calibration(one, texts, starts=("eos",)).rows for one in (tokenizer, byte_tokenizer())]
    assert rows[0] == rows[1]
    assert tokenize(tokenizer, texts, context=64).rows == tokenize(byte_tokenizer(), texts, context=64).rows


@pytest.mark.parametrize("kind", ["bos_token", "eos_token", "pad_token"])
def test_a_named_token_outside_of_the_embedding_is_refused_with_its_id(kind: str) -> None:
    tokenizer, texts = byte_tokenizer(), load_texts("bundled", languages=["en"])
    tokenizer.add_special_tokens({kind: "<new>"})
    with pytest.raises(ArtifactError, match=r"m: the tokenizer gives '<new>' the id 257, .* 257 rows, ids 0\.\.256"):
        check_vocabulary(tokenizer, texts, rows=257, name="m")
    check_vocabulary(tokenizer, texts, rows=258, name="m")


def test_an_added_token_is_refused_where_a_sentence_has_it_and_named_where_none_has(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tokenizer, texts = byte_tokenizer(), load_texts("bundled", languages=["en"])
    tokenizer.add_tokens(["<image>"])
    check_vocabulary(tokenizer, texts, rows=257, name="m")
    assert "m: the tokenizer has 1 added tokens outside of the embedding's 257 rows, first '<image>'" in caplog.text
    path = tmp_path / "texts.json"
    path.write_text(json.dumps({"en": ["one", "an <image> here"]}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="the tokenizer gives '<image>' the id 257"):
        check_vocabulary(tokenizer, load_texts(path), rows=257, name="m")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "gpt_neox"])
def test_the_rows_of_the_embedding_are_read_from_the_headers(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family)
    files = resolve_model(str(tmp_path))
    files.config["vocab_size"] = 1
    assert stored_embedding_rows(files) == VOCABULARY


def test_the_quick_tokenizer_says_what_the_models_own_does(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    quick, texts = counting_tokenizer(resolve_model(str(tmp_path))), load_texts("bundled", languages=["en"])
    assert isinstance(quick, QuickTokenizer)
    assert all_beginnings(quick) == all_beginnings(byte_tokenizer())
    assert prompt_ids(quick, "one") == prompt_ids(byte_tokenizer(), "one")
    with pytest.raises(ArtifactError, match="the model's embedding has 50 rows"):
        check_vocabulary(quick, texts, rows=50, name="m")
