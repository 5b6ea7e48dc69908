from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.measure.rows import tokenize
from quant_fairness_plugin.model.resolve import BUNDLED, resolve_model
from quant_fairness_plugin.model.tokenizer import QuickTokenizer, counting_tokenizer
from quant_fairness_plugin.texts.load import load_texts
from tests.tiny import write_tiny_model


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
