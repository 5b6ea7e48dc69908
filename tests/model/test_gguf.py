from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quant_fairness_plugin.errors import MissingExtraError, ResourceError, UnsupportedModelError
from quant_fairness_plugin.model import gguf
from quant_fairness_plugin.model.resolve import resolve_model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that looks like GGUF by its name alone, with a cache of its own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: object())
    path = tmp_path / "Tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF and four bits a weight")
    return path


@pytest.fixture
def readings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read; every one gives the tiny model."""
    read: list[Path] = []

    def stand_in(path: Path, dtype: str) -> PreTrainedModel:
        read.append(path)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        return model

    monkeypatch.setattr(gguf, "_read", stand_in)
    monkeypatch.setattr(gguf, "_read_tokenizer", lambda path, model: AutoTokenizer.from_pretrained(folder))
    return read


def test_a_gguf_file_is_a_model_and_is_converted_once(file: Path, readings: list[Path]) -> None:
    files = resolve_model(str(file))
    again = resolve_model(str(shutil.copy(file, file.with_name("Same.gguf"))))
    assert files.layers == 2
    assert readings == [file, file.with_name("Same.gguf")]  # a label of its own, hence a folder of its own
    assert resolve_model(str(file)).folder == files.folder != again.folder
    assert len(readings) == 2
    source = json.loads((files.folder / gguf.SOURCE).read_text())
    assert source["file"] == file.name
    assert source["weights"] == "dequantized to bfloat16"
    assert "Tiny.Q4_1" in files.name


def test_a_changed_file_is_another_model(file: Path, readings: list[Path]) -> None:
    before = resolve_model(str(file)).folder
    file.write_bytes(b"GGUF, changed")
    assert resolve_model(str(file)).folder != before


def test_a_failed_conversion_leaves_nothing_in_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, dtype: str) -> None:
        raise UnsupportedModelError("not this one")

    monkeypatch.setattr(gguf, "_read", broken)
    with pytest.raises(UnsupportedModelError, match="not this one"):
        resolve_model(str(file))
    assert list((file.parent / "cache" / "quant-fairness" / "gguf").iterdir()) == []


def test_without_the_extra_the_way_to_install_it_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(MissingExtraError, match=r"a GGUF file needs gguf. Install them: pip .*quant-fairness\[gguf\]"):
        resolve_model(str(file))


def test_what_transformers_cannot_read_is_refused_with_its_reason(file: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Tiny\.Q4_1\.gguf: Transformers does not read this GGUF \(.+\)"):
        resolve_model(str(file))


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "cache").write_text("a file in the way")
    with pytest.raises(ResourceError, match="XDG_CACHE_HOME"):
        resolve_model(str(file))
