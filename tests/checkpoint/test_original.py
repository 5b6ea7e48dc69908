"""A checkpoint is measured against the model that it was made from, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness_plugin.checkpoint.original import check_original
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.model.resolve import resolve_model


@pytest.fixture(scope="module")
def made(planted_model: Path, planted_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    quantizer = FairQuantizer.from_pretrained(
        planted_model, protect_layers="none", group_size=32, texts=planted_file, draws=100
    )
    record = quantizer.save_pretrained(out)
    assert record.measurement is not None
    assert record.measurement.original_compared is True
    return out


@pytest.fixture(scope="module")
def other(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    folder = tmp_path_factory.mktemp("changed") / "other"
    shutil.copytree(planted_model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(planted_model)
    loaded.get_input_embeddings().weight.data.mul_(1.5)
    loaded.save_pretrained(folder)
    return folder


def without_record(made: Path, folder: Path) -> Path:
    """The checkpoint as another tool would have written it."""
    shutil.copytree(made, folder)
    (folder / "quant_fairness.json").unlink()
    return folder


def test_the_original_is_known_by_its_checksum(made: Path, planted_model: Path) -> None:
    assert check_original(made, resolve_model(str(planted_model)))


def test_other_weights_are_refused_with_both_names(made: Path, other: Path, planted_file: str) -> None:
    with pytest.raises(ConfigError, match=r"was made from planted with sha256 \w{12}, and other has \w{12}"):
        check_original(made, resolve_model(str(other)))
    quantizer = FairQuantizer.from_pretrained(other, texts=planted_file, draws=100)
    with pytest.raises(ConfigError, match="was made from planted with sha256"):
        quantizer.measure_folder(made)


def test_another_architecture_is_refused_without_a_record_too(
    made: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    foreign = without_record(made, tmp_path / "foreign")
    for folder, origin in ((made, "planted"), (foreign, "another model")):
        with pytest.raises(ConfigError, match=f"was made from {origin}, not from gpt2.*: model_type is"):
            check_original(folder, resolve_model(str(tiny_model("gpt2"))))


def test_another_vocabulary_is_refused(made: Path, planted_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "foreign")
    config = folder / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"vocab_size": 7}
    config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="vocab_size is 7 in the one"):
        check_original(folder, resolve_model(str(planted_model)))


def test_without_a_record_the_claim_says_that_nothing_was_compared(
    made: Path, planted_model: Path, planted_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = without_record(made, tmp_path / "foreign")
    quantizer = FairQuantizer.from_pretrained(planted_model, texts=planted_file, draws=100)
    measured = quantizer.measure_folder(foreign)
    assert (measured.original_compared, measured.held_out) == (False, None)
    assert measured.condition == "what foreign was calibrated on is not recorded"
    assert "whether it was made from planted is not known" in caplog.text


def test_a_model_in_memory_is_compared_by_its_embedding(
    made: Path, planted_model: Path, planted_file: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(planted_model)
    model = AutoModelForCausalLM.from_pretrained(planted_model)
    same = FairQuantizer.from_pretrained(model, tokenizer=tokenizer, texts=planted_file, draws=100)
    assert same.measure_folder(made).original_compared is False
    assert "cannot be compared with that of" in caplog.text
    model.get_input_embeddings().weight.data.mul_(1.5)
    different = FairQuantizer.from_pretrained(model, tokenizer=tokenizer, texts=planted_file, draws=100)
    with pytest.raises(ConfigError, match="their embeddings differ"):
        different.measure_folder(made)


def test_a_checkpoint_of_a_model_in_memory_says_so(planted_model: Path, planted_file: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(planted_model)
    quantizer = FairQuantizer.from_pretrained(
        model, tokenizer=AutoTokenizer.from_pretrained(planted_model), protect_layers="none", group_size=32,
        texts=planted_file, draws=100,
    )  # fmt: skip
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.provenance.arguments["model in memory"] is True
    assert not check_original(tmp_path / "out", resolve_model(str(planted_model)))
