from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from quant_fairness_plugin.errors import ArtifactError, ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.in_memory import copy_model
from quant_fairness_plugin.model.load import LoadedModel, empty_model, from_loaded, load_model, quiet_transformers
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import model_sha256, resolve_model
from quant_fairness_plugin.model.streamed import open_streamed
from tests.model.checkpoints import edit
from tests.tiny import FAMILIES, byte_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.tensor([[0, 5, 9, 77, 130, 9, 5]])


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (or, with None, drop) tensors of the checkpoint."""
    content = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in content.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


# Loading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_transformers_loads_it(family: str, tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model(family)))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, plain(IDS).logits)
    assert (loaded.family.name, loaded.layers, loaded.storage_dtype) == (family, 2, torch.float16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("été שלום").input_ids) == "été שלום"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_model_has_the_structure_and_no_weights(family: str, tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model(family)))
    empty = empty_model(loaded.files)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert detect_family(empty) == loaded.family


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_16_bit_checkpoint_keeps_its_values_exactly(name: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype=name)
    loaded = load_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert loaded.storage_dtype == getattr(torch, name)
    assert all(torch.equal(loaded.model.get_parameter(k), v.float()) for k, v in stored.items())


def test_a_32_bit_checkpoint_is_rounded_to_float16(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype="float32")
    loaded = load_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    assert loaded.storage_dtype == torch.float16
    assert all(torch.equal(loaded.model.get_parameter(k), v.half().float()) for k, v in stored.items())
    assert not torch.equal(loaded.model.get_parameter(UP), stored[UP])


def test_norms_in_32_bit_do_not_make_a_16_bit_checkpoint_a_32_bit_one(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype="bfloat16")
    mixed = folder.with_name("mixed")
    shutil.copytree(folder, mixed)
    change(mixed, model__norm__weight=torch.full((32,), 1 / 3))
    loaded = load_model(str(mixed))
    assert loaded.storage_dtype == torch.bfloat16
    assert loaded.model.get_parameter("model.norm.weight")[0] == torch.tensor(1 / 3).bfloat16()


def test_a_value_too_large_for_float16_is_refused_not_made_infinite(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype="float32")
    large = folder.with_name("large")
    shutil.copytree(folder, large)
    weight = torch.zeros(64, 32)
    weight[3, 5] = -70_000.0
    change(large, **{UP: weight})
    with pytest.raises(UnsupportedModelError, match=rf"{UP} holds 7e\+04, and torch.float16 ends at 6\.55e\+04"):
        load_model(str(large))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_compute_dtype_converts_the_weights_but_not_the_rotary_table(folder: Path, dtype: torch.dtype) -> None:
    model = load_model(str(folder), dtype=dtype).model
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for name, b in model.named_buffers() if name.endswith("inv_freq")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64])
def test_other_dtypes_are_refused_before_anything_is_read(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="cannot be computed in; use float32, float16 or bfloat16"):
        load_model("no/such/model", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "xpu:99"])
def test_a_device_that_does_not_exist_is_refused_before_anything_is_read(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used .*Use cpu") as caught:
        load_model("no/such/model", device=device)
    assert "\n" not in str(caught.value)


def test_a_tied_head_stays_tied(tiny_model: Callable[..., Path]) -> None:
    model = load_model(str(tiny_model("gpt2"))).model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_pickled_weights_load_with_consent_and_equal_the_safetensors(folder: Path) -> None:
    expected = load_model(str(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = load_model(str(folder), allow_pickle=True)
    assert loaded.storage_dtype == torch.float16
    assert torch.equal(loaded.model.get_parameter(UP), expected.model.get_parameter(UP))


def test_the_key_names_of_the_original_gpt2_checkpoint_load(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "gpt2"))
    expected = load_model(str(folder))
    stored = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}  # buffers of old versions
    save_file(stored | masks, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(folder))
    assert "wte.weight" in stored
    pairs = zip(loaded.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Bomb:
    """Unpickled without `weights_only`, it creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_a_hostile_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin: cannot be read as weights \(UnpicklingError\)"):
        load_model(str(folder), allow_pickle=True)
    assert not Path("exploded").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert Path("exploded").exists()  # the bomb was live


# Checkpoints that do not fit


def test_a_missing_tensor_is_an_error_not_random_numbers(folder: Path) -> None:
    change(folder, **{UP: None})
    with pytest.raises(ArtifactError, match=rf"not those of the config \(1 missing: {UP}\)"):
        load_model(str(folder))


def test_a_surplus_tensor_is_an_error(folder: Path) -> None:
    change(folder, model__layers__2__mlp__up_proj__weight=torch.zeros(64, 32))
    with pytest.raises(ArtifactError, match=r"1 unexpected: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_a_tensor_of_another_shape_is_an_error(folder: Path) -> None:
    change(folder, **{UP: torch.zeros(63, 32)})
    with pytest.raises(ArtifactError, match=rf"1 of another shape: {UP}"):
        load_model(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    weight = torch.zeros(64, 32, dtype=torch.float16)
    weight[63, 31] = value
    change(folder, **{UP: weight})
    with pytest.raises(ArtifactError, match=f"{UP} holds NaN or infinite values"):
        load_model(str(folder))


def test_weights_without_floating_point_values_are_refused(folder: Path) -> None:
    save_file({UP: torch.zeros(64, 32, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="no floating-point weights"):
        load_model(str(folder))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ArtifactError, match="the tokenizer does not load"):
        load_model(str(folder))


def test_a_config_that_transformers_cannot_use_is_refused(folder: Path) -> None:
    edit(folder / "config.json", model_type="never-seen")
    with pytest.raises(ArtifactError, match=r"config\.json: .*never-seen.*Restore the model's file") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_an_architecture_that_is_no_causal_model_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "vit", "num_hidden_layers": 2}))
    with pytest.raises(UnsupportedModelError, match="cannot be built as a causal language model") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_an_unsupported_structure_is_refused_before_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "config.json"
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path.write_text(json.dumps(small | {"model_type": "granitemoe", "num_hidden_layers": 2, "num_local_experts": 2}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedModelError, match="holds a mixture of experts"):
        load_model(str(folder))


# The loaded model


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny_model("llama", layers=3)))


def test_linears_are_the_modules_of_their_layer_by_full_name(llama: LoadedModel) -> None:
    linears = llama.linears(1)
    assert tuple(linears) == llama.family.full_names(1)
    assert all(llama.model.get_submodule(name) is module for name, module in linears.items())
    assert llama.block(1) is llama.model.model.layers[1]


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_outside_the_model_is_an_error(llama: LoadedModel, layer: int) -> None:
    with pytest.raises(InvalidLayerError, match=rf"layer {layer} does not exist: the model has 3 layers"):
        llama.block(layer)
    with pytest.raises(InvalidLayerError, match=rf"layer {layer} does not exist"):
        llama.linears(layer)


# Models in memory


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert isinstance(model, LlamaForCausalLM)
    return model


def test_a_model_in_memory_is_wrapped_and_not_changed(folder: Path) -> None:
    model = plain(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    loaded = from_loaded(model, byte_tokenizer())
    assert loaded.model is model
    assert (loaded.layers, loaded.family.name, loaded.files.weights) == (2, "llama", ())
    assert not loaded.files.folder.exists()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_storage_dtype_of_a_model_in_memory_is_its_own_where_it_has_16_bits(
    folder: Path, dtype: torch.dtype
) -> None:
    loaded = from_loaded(plain(folder, dtype), byte_tokenizer())
    assert loaded.storage_dtype == (torch.float16 if dtype == torch.float32 else dtype)


def test_the_checksum_of_a_model_in_memory_is_that_of_its_weights_when_wrapped(folder: Path) -> None:
    model = plain(folder)
    first = from_loaded(model, byte_tokenizer())
    assert model_sha256(first.files) == model_sha256(from_loaded(plain(folder), byte_tokenizer()).files)
    before = model_sha256(first.files)
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] += 1
    assert model_sha256(first.files) == before
    assert model_sha256(from_loaded(model, byte_tokenizer()).files) != before


def test_a_quantized_model_in_memory_is_refused(folder: Path) -> None:
    model = plain(folder)
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="the model is already quantized"):
        from_loaded(model, byte_tokenizer())


def test_a_model_on_the_meta_device_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="weights are on the meta device; expected"):
        from_loaded(empty_model(resolve_model(str(folder))), byte_tokenizer())


def test_a_module_that_is_no_transformers_model_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential is not a Transformers model.*merge_and_unload"):
        from_loaded(nn.Sequential(plain(folder)), byte_tokenizer())  # type: ignore[arg-type]


# Silence


def test_loading_writes_nothing_to_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(folder))
    assert capfd.readouterr() == ("", "")
    plain(folder)
    assert "Loading weights" in capfd.readouterr().err  # what the silence is about


def test_the_silence_ends_with_the_block_even_after_an_error() -> None:
    def state() -> tuple[bool, int]:
        return transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()

    def fail() -> None:
        with quiet_transformers():
            assert state() == (False, logging.ERROR)
            raise RuntimeError("inside")

    before = state()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert state() == before
    assert before[0]


def test_nested_silence_ends_with_the_outer_block() -> None:
    with quiet_transformers():
        with quiet_transformers():
            pass
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_a_32_bit_checkpoint_is_stored_in_the_16_bit_dtype_that_its_config_says(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, dtype: str | None
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", dtype="float32"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config if dtype is None else config | {key: dtype}))
    loaded = load_model(str(folder))
    assert loaded.storage_dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    assert torch.equal(loaded.model.get_parameter(UP), loaded.model.get_parameter(UP).to(loaded.storage_dtype).float())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_beyond_float16_are_stored_in_bfloat16(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    """Whatever the config says; each weight alone would fit."""
    folder = Path(shutil.copytree(tiny_model("llama", dtype=dtype), tmp_path / "model"))
    down = torch.zeros(32, 64)
    down[7] = 60_000.0
    change(folder, **{UP.replace("up_proj", "down_proj"): down})
    loaded = load_model(str(folder), sentences=["one sentence"])
    assert loaded.storage_dtype == torch.bfloat16
    assert "and float16 ends at 65504: stored and served in bfloat16" in caplog.text
    copied = copy_model(loaded.model.to(torch.float32), loaded.tokenizer)
    assert copied.storage_dtype == torch.bfloat16


def test_a_head_of_its_own_is_used_although_the_config_ties_it(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Transformers does; plan, sweep and quantize see the same model."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    loaded = load_model(str(folder))
    assert not loaded.family.tied_head
    assert "config.json says tie_word_embeddings, and the file holds a head of its own" in caplog.text
    assert outline_model(resolve_model(str(folder))).family == loaded.family
    assert not open_streamed(str(folder)).family.tied_head
    change(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())
    assert load_model(str(folder)).family.tied_head
    assert outline_model(resolve_model(str(folder))).family.tied_head


def test_a_missing_head_that_the_config_does_not_tie_names_the_key(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("gemma"), tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    for opened in (load_model, lambda name: outline_model(resolve_model(name))):
        with pytest.raises(ArtifactError, match=r"lm_head.*set tie_word_embeddings to true in config\.json"):
            opened(str(folder))
