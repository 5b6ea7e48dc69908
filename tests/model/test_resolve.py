from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.errors import (
    ArtifactError,
)
from quant_fairness_plugin.model import resolve
from quant_fairness_plugin.model.resolve import BUNDLED, model_sha256, resolve_model, tensor_shapes
from tests.model.checkpoints import drop, edit, refused, shard

# What resolves


def test_a_folder_resolves_to_its_files(folder: Path) -> None:
    files = resolve_model(str(folder))
    assert (files.name, files.folder, files.layers, files.revision) == ("tiny llama", folder, 2, None)
    assert files.weights == (folder / "model.safetensors",)
    assert files.config["model_type"] == "llama"


def test_a_weight_file_stands_for_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder / "model.safetensors")) == resolve_model(str(folder))
    monkeypatch.chdir(folder)
    files = resolve_model("model.safetensors")
    assert files.name == "tiny llama"
    assert files.weights == (Path("model.safetensors"),)
    assert resolve_model(".").name == "tiny llama"


def test_a_shard_stands_for_the_whole_model(folder: Path) -> None:
    whole = tensor_shapes(resolve_model(str(folder)))
    shard(folder)
    files = resolve_model(str(folder / "model-00002-of-00002.safetensors"))
    assert [path.name for path in files.weights] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert tensor_shapes(files) == whole


def test_a_link_to_the_folder_itself_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert resolve_model(str(tmp_path / "link")).name == "tiny llama"


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/tiny llama").folder == folder


def test_shapes_are_read_from_the_header_alone(folder: Path) -> None:
    expected = {k: ("F16", tuple(v.shape)) for k, v in load_file(folder / "model.safetensors").items()}
    assert tensor_shapes(resolve_model(str(folder))) == expected


def test_the_checksum_is_what_sha256sum_prints(folder: Path) -> None:
    listing = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert model_sha256(resolve_model(str(folder))) == hashlib.sha256(listing.encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_changed_byte_changes_the_checksum(folder: Path, name: str) -> None:
    before = model_sha256(resolve_model(str(folder)))
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    files = resolve_model(str(folder))
    (folder / name).write_bytes(content)
    os.utime(folder / name, ns=(1, 1))  # the clock of a fast test may not have moved
    assert model_sha256(files) != before


def test_a_file_that_vanished_has_no_checksum(folder: Path) -> None:
    files = resolve_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read \(No such file"):
        model_sha256(files)


def heavy_imports(code: str) -> str:
    """Which heavy packages a fresh interpreter has imported after running the code."""
    heavy = {"torch", "transformers", "numpy", "pydantic", "httpx", "httpx2"}
    check = f"import sys; print(sorted({heavy} & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True).stdout


def test_resolving_imports_nothing_heavy(folder: Path) -> None:
    code = "from quant_fairness_plugin.model import families, layers, resolve\n"
    assert heavy_imports(f"{code}resolve.resolve_model({str(folder)!r})") == "[]\n"
    assert "numpy" in heavy_imports("import numpy")  # the check itself can fail


# Names


@pytest.mark.parametrize("name", ["no/such/model", "https://huggingface.co/gpt2", "a--b", "x" * 5000, "nul\0byte", "é"])
def test_an_unknown_name_lists_the_three_things_it_could_be(name: str) -> None:
    text = refused(name)
    assert text.startswith("ConfigError: there is no model ")
    assert "a bundled model (demo, demo-gpt2), a folder or .safetensors file on disk, or a Hub id" in text


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert "ConfigError: the model's name is empty. Accepted are a bundled model" in refused(name)


@pytest.mark.parametrize("name", ["model.safetensors", "weights/pytorch_model.bin", "a.pt"])
def test_a_weight_file_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    assert f"ArtifactError: {name}: no such file. Accepted are" in refused(name)


def test_another_file_is_no_model(folder: Path) -> None:
    assert "config.json: a file that is not a model" in refused(folder / "config.json")


def test_a_bundled_name_wins_over_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "__file__", str(tmp_path / "package" / "resolve.py"))
    shutil.copytree(folder, tmp_path / "package" / "bundled" / "demo")
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    files = resolve_model("demo")
    assert (files.name, files.folder) == ("demo", tmp_path / "package" / "bundled" / "demo")


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_that_is_not_installed_is_said_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "__file__", str(tmp_path / "resolve.py"))
    assert "the bundled model is missing from this installation" in refused(name)


def test_a_revision_of_a_folder_is_refused(folder: Path) -> None:
    assert "ConfigError: revision 'main' applies to Hub ids only" in refused(folder, revision="main")


# Configs


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "ArtifactError" in refused(folder)
    assert "no config.json; a model folder holds" in refused(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'"config"', b"{" + b'"a":{' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json: cannot be read as a JSON object (" in refused(folder)


@pytest.mark.parametrize("layers", [0, -1, 2.0, "2", True, None, [2]])
def test_a_layer_count_that_is_no_number_is_refused(folder: Path, layers: object) -> None:
    edit(folder / "config.json", num_hidden_layers=layers)
    assert "ArtifactError" in refused(folder)
    assert "does not say how many layers the model has" in refused(folder)


def test_a_missing_or_contradicting_layer_count_is_refused(folder: Path) -> None:
    edit(folder / "config.json", n_layer=3)
    assert "({'num_hidden_layers': 2, 'n_layer': 3}); expected a whole number in one of" in refused(folder)
    drop(folder / "config.json", "num_hidden_layers", "n_layer")
    assert "(no such key); expected a whole number in one of num_hidden_layers, n_layer" in refused(folder)


def test_a_quantized_model_is_refused_with_its_method(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "UnsupportedModelError" in refused(folder)
    assert "the model is already quantized (gptq)" in refused(folder)
    edit(folder / "config.json", quantization_config="gptq")
    assert "the model is already quantized (gptq)" in refused(folder)


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight_scale"])
def test_quantized_tensors_are_noticed_without_a_word_in_the_config(folder: Path, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    save_file({name: torch.zeros(2, 2, dtype=torch.int32)}, folder / "model.safetensors")
    assert f"the model is already quantized ({name}, I32)" in refused(folder)


def test_float8_weights_are_quantized(folder: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")
    assert "the model is already quantized (a, F8_E4M3)" in refused(folder)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5ForConditionalGeneration"),
        ({"architectures": None, "is_encoder_decoder": True}, "llama"),
    ],
)
def test_a_model_that_is_no_decoder_is_refused(folder: Path, fields: dict[str, Any], what: str) -> None:
    edit(folder / "config.json", **fields)
    assert "UnsupportedModelError" in refused(folder)
    assert f"{what} is not a decoder-only language model; expected a causal one" in refused(folder)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2}, r"num_experts 8"),
        ({"num_local_experts": 8}, r"num_local_experts 8"),
        ({"n_routed_experts": 64}, r"n_routed_experts 64"),
        ({"moe_num_experts": [1, 16]}, r"moe_num_experts 16"),
        ({"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}, r"moe_num_experts 16"),
        ({"text_config": {"num_local_experts": 16}}, r"num_local_experts 16"),
    ],
)
def test_a_mixture_of_experts_is_refused_from_its_config_alone(folder: Path, fields: dict[str, Any], what: str) -> None:
    edit(folder / "config.json", **fields)
    assert re.search(
        rf"UnsupportedModelError: .*config\.json: the model holds a mixture of experts \({what}\), .*Use a dense model",
        refused(folder),
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0, "n_routed_experts": None},
        {"num_experts": 1},
        {"num_experts_per_tok": 2},
        {"is_moe": False, "num_experts": 16384},
    ],
)
def test_words_about_experts_without_experts_are_no_mixture(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder / "config.json", **fields)
    assert resolve_model(str(folder)).layers > 0


def test_a_config_without_architectures_is_left_to_the_structure(folder: Path) -> None:
    drop(folder / "config.json", "architectures")
    assert resolve_model(str(folder)).layers == 2


def test_architectures_that_are_no_list_are_refused(folder: Path) -> None:
    edit(folder / "config.json", architectures={"a": 1})
    assert "ArtifactError" in refused(folder)
    assert "'architectures' is {'a': 1}, expected a list" in refused(folder)


# Code


@pytest.mark.parametrize("key", ["auto_map", "model_file"])
def test_code_of_a_family_that_transformers_lacks_is_refused_unless_trusted(folder: Path, key: str) -> None:
    edit(folder / "config.json", model_type="phi3small", **{key: {"AutoModelForCausalLM": "modeling.Model"}})
    text = refused(folder)
    assert text.startswith("UnsupportedModelError")
    assert f"config.json: names code to be run ({key})" in text
    files = resolve_model(str(folder), trust_remote_code=True)
    assert files.runs_code
    assert key in files.config


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_a_family_that_transformers_has_is_not_run(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / name, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoTokenizer": ["other/repo--t.T", None]})
    files = resolve_model(str(folder))
    assert not files.runs_code
    assert "auto_map" not in files.config
    assert f"{name}: names code (auto_map), which is not run" in caplog.text


def test_a_tokenizer_that_only_code_can_make_is_refused(folder: Path) -> None:
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization.QWenTokenizer", None]}}
    edit(folder / "tokenizer_config.json", **settings)
    assert resolve_model(str(folder)).layers == 2  # Transformers reads tokenizer.json without the class
    (folder / "tokenizer.json").unlink()
    assert "tokenizer_config.json: names code to be run (auto_map)" in refused(folder)


REASONS = {
    "recurrent_gemma": "recurrent or state-space", "mamba": "recurrent or state-space", "rwkv": "recurrent or",
    "xlstm": "recurrent or state-space", "zamba2": "recurrent or state-space", "falcon_mamba": "recurrent or",
    "bitnet": "ternary weights", "bert": "an encoder", "xlm-roberta": "an encoder", "whisper": "the decoder of an enc",
    "bart": "the decoder of an encoder-decoder", "marian": "the decoder of an encoder-decoder", "blt": "byte patches",
    "hrm_text": "runs the same blocks in cycles",
}  # fmt: skip


@pytest.mark.parametrize("model_type", REASONS)
@pytest.mark.parametrize("experts", [{}, {"num_experts": 1}])
def test_an_architecture_is_refused_for_what_it_is(folder: Path, model_type: str, experts: dict[str, int]) -> None:
    edit(folder / "config.json", model_type=model_type, **experts)
    text = refused(folder)
    assert text.startswith("UnsupportedModelError")
    assert REASONS[model_type] in text
    assert "mixture of experts" not in text


def test_a_decoder_that_also_sees_is_refused_as_one(folder: Path) -> None:
    edit(folder / "config.json", model_type="new_vl", vision_config={"depth": 2})
    assert "new_vl is a model of text with images or sound" in refused(folder)


def test_the_layers_of_a_wrapper_are_those_of_its_text_decoder(folder: Path) -> None:
    wrapped = {"text_config": {"num_hidden_layers": 7}, "vision_config": {"num_hidden_layers": 3}}
    edit(folder / "config.json", architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3", **wrapped)
    assert resolve_model(str(folder)).layers == 7


def test_code_from_another_repository_is_never_run(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--modeling.Model"})
    assert "takes its code from another repository, which no revision pins" in refused(folder, trust_remote_code=True)


def test_a_folder_of_a_bundled_name_is_not_taken_for_the_bundled_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./demo").name == "./demo"
    assert resolve_model("demo").name == "demo"
    assert "demo is the bundled model; the folder of that name here is ./demo" in caplog.text
