"""`load_quantized` runs any of our exports by every kernel, and gives exactly the quantized model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_fairness_kernels import cpu_matmul as cpu_module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import CheckpointFormat, Grid
from quant_fairness_plugin.checkpoint.dequantize import bare_model, model_from_state, read_dense_state
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.serve.linear import QuantizedLinear
from quant_fairness_plugin.serve.load import load_quantized
from tests.export import foreign_folders as tools
from tests.export.build import TEXTS, quantize_tiny
from tests.serve.conftest import Served
from tests.tiny import FAMILIES

ROW = torch.arange(1, 34).unsqueeze(0)
FORMATS = ("compressed-tensors", "gptq", "awq")
BFLOAT16 = 0.05
"""Largest difference over the largest logit. bfloat16 keeps 8 bits, an error of 0.4 % in each of some twenty rounded
steps of these two layers; one to two percent were seen, also with dense weights. Garbage gives about 1."""
WITHOUT_BIASES = ("llama", "mistral", "qwen3", "gemma")


@pytest.fixture(scope="module", params=[("llama", "compressed-tensors"), ("gpt2", "gptq"), ("gpt_neox", "gptq")])
def case(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    family: str = request.param[0]
    format_name: CheckpointFormat = request.param[1]
    quantized = quantize_tiny(tiny_model(family, layers=2), protected=(1,))
    out = tmp_path_factory.mktemp("serve") / family
    export(quantized, out, texts=TEXTS, format=format_name, reader="vllm")
    return out, quantized


@torch.no_grad()
def logits(model: Any, row: Tensor = ROW) -> Tensor:
    found: Tensor = model(input_ids=row).logits
    return found.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_logits_equal_those_of_the_quantized_model_in_memory(case: tuple[Path, Any]) -> None:
    out, quantized = case
    with swapped(quantized.loaded, quantized.dense_weights()) as model:
        expected = model(input_ids=ROW).logits
    original = quantized.loaded.model(input_ids=ROW).logits
    found = load_quantized(out, kernel="reference")(input_ids=ROW).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, original, rtol=1e-3)


def test_the_model_is_in_float32_and_evaluation_mode_and_generates(case: tuple[Path, Any]) -> None:
    model = load_quantized(case[0], kernel="reference")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == case[1].loaded.family.tied_head
    tokens = model.generate(ROW[:, :3], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)


def test_nothing_outside_the_folder_is_needed(case: tuple[Path, Any], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in case[0].iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert torch.equal(logits(load_quantized(moved)), logits(load_quantized(case[0])))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_format_computes_what_the_reference_does(
    served: Served, monkeypatch: pytest.MonkeyPatch, family: str, format_name: str
) -> None:
    folder = served(family, format_name)
    expected = logits(load_quantized(folder, kernel="reference"))
    exact = load_quantized(folder, kernel="cpu", dtype=torch.float32)
    assert sum(isinstance(module, QuantizedLinear) for module in exact.modules()) == len(packed(folder))
    # The same values and the same operator; only the bias is added in a step of its own.
    assert difference(logits(exact), expected) <= 1e-6

    auto = logits(load_quantized(folder))
    assert 0 < difference(auto, expected) < BFLOAT16
    dense = model_from_state(folder, bare_model(folder), read_dense_state(folder), dtype=torch.bfloat16)
    if family in WITHOUT_BIASES:
        assert torch.equal(auto, logits(dense))

    monkeypatch.setattr(cpu_module, "measured_rows", lambda N, K: 64)  # noqa: N803 - tiny shapes were not measured
    by_operator = logits(load_quantized(folder, kernel="cpu"))
    assert difference(by_operator, expected) < BFLOAT16
    assert not torch.equal(by_operator, auto)


def packed(folder: Path) -> set[str]:
    record = json.loads((folder / "quant_fairness.json").read_text(encoding="utf-8"))
    return set(record["quantized_modules"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_float32_logits_equal_those_of_transformers(served: Served, family: str) -> None:
    folder = served(family)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for model in (
        load_quantized(folder, dtype=torch.float32),
        load_quantized(folder, kernel="cpu", dtype=torch.float32),
    ):
        assert difference(logits(model), logits(theirs)) <= 1e-5


@pytest.mark.parametrize("grid", [Grid(group_size=-1), Grid(group_size=32, symmetric=False)], ids=str)
@pytest.mark.parametrize("format_name", ["compressed-tensors", "awq"])
def test_other_grids(served: Served, grid: Grid, format_name: str) -> None:
    folder = served("llama", format_name, grid=grid)
    expected = logits(load_quantized(folder, kernel="reference"))
    assert difference(logits(load_quantized(folder, kernel="cpu", dtype=torch.float32)), expected) <= 1e-6
    assert difference(logits(load_quantized(folder)), expected) < BFLOAT16


def test_widths_that_fill_no_block(served: Served) -> None:
    folder = served("opt", width=40, grid=Grid(group_size=-1))
    expected = logits(load_quantized(folder, kernel="reference"))
    assert difference(logits(load_quantized(folder, kernel="cpu", dtype=torch.float32)), expected) <= 1e-6
    assert difference(logits(load_quantized(folder)), expected) < BFLOAT16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_protected_modules_are_plain_and_hold_the_stored_values(
    served: Served, family: str, dtype: torch.dtype
) -> None:
    folder = served(family, "gptq")
    model, reference = load_quantized(folder, kernel="cpu", dtype=dtype), load_quantized(folder, kernel="reference")
    kept = {name for name, module in reference.named_modules() if is_linear(module)} - packed(folder)
    assert len(kept) > 4
    for name in kept:
        weight = linear_weight(model.get_submodule(name))
        assert weight.dtype == dtype
        assert torch.equal(weight, linear_weight(reference.get_submodule(name)).to(dtype))
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in packed(folder))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_8_bit_modules_are_dequantized_and_the_log_says_so(
    served: Served, caplog: pytest.LogCaptureFixture, format_name: str
) -> None:
    folder = served("llama", format_name, overrides={"layers.0.down": "int8"})
    with caplog.at_level("INFO", logger="quant_fairness_plugin.serve.load"):
        model = load_quantized(folder, kernel="cpu", dtype=torch.float32)
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    assert type(module) is nn.Linear
    assert "model.layers.0.mlp.down_proj is dequantized: it does not have 4 bits" in caplog.text
    assert "6 modules by cpu, 1 dequantized, 8 plain" in caplog.text
    assert difference(logits(model), logits(load_quantized(folder, kernel="reference"))) <= 1e-6


def test_an_export_without_quantized_modules_is_loaded_in_16_bit(served: Served) -> None:
    folder = served("llama", "fp16-twin")
    model = load_quantized(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert difference(logits(model), logits(load_quantized(folder, kernel="reference"))) < BFLOAT16


@pytest.fixture
def copy(served: Served, tmp_path: Path) -> Callable[..., Path]:
    return lambda *args: Path(shutil.copytree(served(*args), tmp_path / "copy"))


def test_a_folder_of_another_tool_with_act_order_is_loaded(copy: Callable[..., Path]) -> None:
    folder = copy("llama", "gptq")
    tools.gptqmodel(folder)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj.g_idx"
    tools.change_tensors(folder, lambda t: t.update({name: (torch.arange(64) // 32)[order].int()}))
    model = load_quantized(folder, kernel="cpu", dtype=torch.float32)
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QuantizedLinear)
    assert difference(logits(model), logits(load_quantized(folder, kernel="reference"))) <= 1e-6


def test_scaled_activations_are_dequantized(copy: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = copy("bloom", "awq")
    scales = torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5
    (folder / "quant_fairness.json").unlink()
    tools.change_tensors(folder, lambda t: t.update({"transformer.h.0.mlp.gelu_impl.scales": scales.half()}))
    with caplog.at_level("INFO", logger="quant_fairness_plugin.serve.load"):
        model = load_quantized(folder, kernel="cpu", dtype=torch.float32)
    assert "transformer.h.0.mlp.dense_4h_to_h is dequantized: its activations are scaled" in caplog.text
    assert difference(logits(model), logits(load_quantized(folder, kernel="reference"))) <= 1e-6


def test_a_record_that_protects_a_quantized_module_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy("llama", "compressed-tensors")
    path = folder / "quant_fairness.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["quantized_modules"]["model.layers.0.mlp.up_proj"]
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.up_proj is stored quantized, and the record says other"):
        load_quantized(folder)


def test_a_protected_module_that_is_stored_in_8_bit_is_refused(copy: Callable[..., Path]) -> None:
    folder, name = copy("llama", "compressed-tensors"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj\.weight is protected, and stored as torch\.int8"):
        load_quantized(folder)


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown kernel 'cuda'; accepted are auto, triton, cpu, reference"):
        load_quantized(tmp_path, kernel="cuda")  # type: ignore[arg-type] # the refusal is the test
    with pytest.raises(ConfigError, match="kernel 'triton' computes in float16 or bfloat16"):
        load_quantized(tmp_path, kernel="triton", dtype=torch.float32)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for kernel in ("auto", "reference"):
        with pytest.raises(ArtifactError, match="no weights|cannot be read|describes no model"):
            load_quantized(tmp_path, kernel=kernel)  # type: ignore[arg-type] # both are kernels
