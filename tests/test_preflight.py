"""Layers and units with a precision of their own are checked against the model before its weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ArtifactError, ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.preflight import ModelSource, check_units, configure, known_units, preflight
from tests.tiny import byte_tokenizer, tiny_config


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"int8_layers": [2]}, r"2: layer 2 does not exist: the model has 2 layers, accepted are 0\.\.1"),
        ({"protect_units": ["5.down"]}, r"5\.down: layer 5 does not exist"),
        ({"protect_units": ["1.fc_in"]}, r"1\.fc_in is not a unit of the model; its layer 1 has qkv, o, gate_up, down"),
    ],
)
def test_a_unit_that_the_model_lacks_fails_early(
    tiny_model: Callable[..., Path], chosen: dict[str, Any], message: str
) -> None:
    source = ModelSource(str(tiny_model("llama", layers=2)))
    preflight(source, make_config(protect_units=["1.down", "0.gate_up"], protect_layers="none"))
    with pytest.raises(InvalidLayerError, match=message):
        preflight(source, make_config(protect_layers="none", **chosen))


def test_a_format_that_cannot_hold_the_layers_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    config = make_config(format="awq", int8_layers=[0], protect_layers="none")
    with pytest.raises(UnsupportedModelError, match="4-bit integers only"):
        preflight(ModelSource("no-such-model"), config, out=tmp_path / "out")


def test_a_layer_of_a_hybrid_has_units_of_its_own() -> None:
    layers = (("conv.in_proj", "o"), ("qkv", "o"))
    check_units(make_config(protect_units=["0.conv.in_proj", "1.qkv"]), units=layers.__getitem__, layers=2)
    with pytest.raises(InvalidLayerError, match=r"0\.qkv is not a unit .* its layer 0 has conv\.in_proj, o\."):
        check_units(make_config(protect_units=["0.qkv"]), units=layers.__getitem__, layers=2)


def test_units_of_an_unknown_architecture_are_left_for_later() -> None:
    assert known_units("opt") == ("qkv", "o", "fc_in", "fc_out")
    assert known_units("strange") is None
    check_units(make_config(protect_units=["1.anything"]), units=None, layers=2)


def short_model(folder: Path, positions: int, family: str = "llama") -> Path:
    """A tiny model that takes few tokens at once."""
    config = tiny_config(family, layers=2, width=32)
    setattr(config, "n_positions" if family == "gpt2" else "max_position_embeddings", positions)
    AutoModelForCausalLM.from_config(config).to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "positions"), [("llama", 64), ("gpt2", 32), ("opt", 16), ("llama", 4)])
def test_a_model_of_few_positions_gets_shorter_rows_and_says_so_once(
    family: str, positions: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = short_model(tmp_path / "m", positions, family)
    reader = "vllm" if family == "gpt2" else "transformers"
    options: dict[str, Any] = {"group_size": 32, "reader": reader, "languages": ("en", "he"), "draws": 100}
    record = FairQuantizer.from_pretrained(folder, protect_layers="none", **options).save_pretrained(tmp_path / "out")
    assert record.calibration["row_tokens"] == positions
    assert record.measurement is not None
    said = f"m takes {positions} tokens at once: calibration rows have {positions} instead of 256"
    assert caplog.text.count(said) == 1


def test_too_few_positions_are_refused_before_the_work(tmp_path: Path) -> None:
    source = ModelSource(str(short_model(tmp_path / "m", 3)))
    with pytest.raises(UnsupportedModelError, match="m: takes 3 tokens at once, too few"):
        preflight(source, make_config(protect_layers="none"))


@pytest.mark.parametrize("plain", [True, False])
def test_a_token_outside_of_the_embedding_is_refused_before_the_work(
    plain: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": [f"<{i}>" for i in range(9)]})
    tokenizer.bos_token = "<8>"
    tokenizer.save_pretrained(folder)
    if not plain:  # a setting that the quick tokenizer does not know: only Transformers can tell
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"add_prefix_space": False}))
    message = "the tokenizer gives '<8>' the id 266, and the model's embedding has 264 rows"
    if plain:
        with pytest.raises(ArtifactError, match=f"m: {message}"):
            preflight(ModelSource(str(folder)), make_config(protect_layers="none"))
    with pytest.raises(ArtifactError, match=f"m: {message}"):
        FairQuantizer.from_pretrained(folder, protect_layers="none")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ArtifactError, match=message):
        FairQuantizer.from_pretrained(model, tokenizer=tokenizer, protect_layers="none")


@pytest.mark.parametrize(
    ("rows", "chosen", "message"),
    [
        ([{"en": "One.", "he": "אחת."}], {}, r"1 sentence\(s\) in the part 'confirm', and 2 or more are needed"),
        (
            [{"part": "confirm", "en": f"Row {i}.", "he": f"שורה {i}."} for i in range(4)],
            {"protect_layers": "none"},
            r"0 sentence\(s\) in the part 'calibrate', and 1 or more",
        ),
        (
            [
                {"part": part, "en": f"Row {part}{i}.", "he": f"{i} {part}"}
                for i in range(4)
                for part in ("calibrate", "confirm")
            ],
            {},
            r"0 sentence\(s\) in the part 'search', and 2 or more",
        ),
    ],
)
def test_texts_that_are_too_few_are_refused_before_the_work(
    rows: list[dict[str, str]], chosen: dict[str, Any], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    source = ModelSource(str(tiny_model("llama")))
    with pytest.raises(ConfigError, match=message):
        preflight(source, make_config(texts=str(texts), **chosen), out=tmp_path / "out")
    preflight(source, make_config(texts=str(texts), **chosen))  # nothing is to be written: only looked at


def test_a_limit_of_a_language_that_is_not_measured_is_refused_before_a_weight_is_read(planted_file: str) -> None:
    config = FairConfig(texts=planted_file, limits={"fr": 0.1}, target="worst=0.1")
    with pytest.raises(ConfigError, match=r"limits \(fr: not measured\); measured are"):
        preflight(ModelSource("demo"), config)
    double = FairConfig(texts=planted_file, limits={"he": 0.1, "iw": 0.2}, target="worst=0.1")
    with pytest.raises(ConfigError, match="a language is named twice"):
        preflight(ModelSource("demo"), double)


def test_the_model_itself_is_no_output(planted_model: Path, planted_file: str, tmp_path: Path) -> None:
    """A 16-bit twin is a checkpoint of ours and a model at once."""
    twin = tmp_path / "twin"
    shutil.copytree(planted_model, twin)
    (twin / "quant_fairness.json").write_text("{}")
    config = FairConfig(texts=planted_file)
    with pytest.raises(ConfigError, match="is the model itself; the output must be another folder"):
        preflight(ModelSource(str(twin)), config, out=twin, overwrite=True)


def test_python_arguments_of_another_type_are_named() -> None:
    given: Any = {"bits": 4}
    with pytest.raises(ConfigError, match="config is a dict, and a FairConfig is accepted"):
        configure(given, {})
    texts: Any = {"en": ["One.", "Two."]}
    with pytest.raises(ConfigError, match="texts is a dict, and a text set, a path or a name is accepted"):
        configure(None, {"texts": texts})
