"""Checkpoints of floats: as compressed-tensors has them, read by Transformers, and as large as plans say."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid, Precision, ReaderRun
from quant_fairness_plugin.checkpoint.dense_modules import dense_weight
from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.checkpoint.formats import stored_format
from quant_fairness_plugin.checkpoint.formats.format import Format, StoredGrid
from quant_fairness_plugin.checkpoint.readers import check_exportable, check_metadata, metadata_problems
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.contents import checkpoint_tensors
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.costs import count_bytes, plan_bytes
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.schemes import SCHEMES
from tests.export.build import TEXTS, llama_map, quantize_tiny
from tests.planning import quantize_layers
from tests.tiny import byte_tokenizer

NAMES = sorted(SCHEMES)
FP4 = ("mxfp4", "nvfp4")
SUFFIXES = {
    "fp8": {"weight": "F8_E4M3", "weight_scale": "BF16"},
    "mxfp4": {"weight_packed": "U8", "weight_scale": "U8"},
    "nvfp4": {"weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32"},
}
Build = Callable[..., Path]


def grid_of(name: str) -> Grid:
    return SCHEMES[name].grid("mse")


def form_of(name: str) -> Format:
    return stored_format("compressed-tensors", grid_of(name))


def model_of(tiny_model: Build) -> Path:
    return tiny_model("llama", layers=3, width=64, dtype="bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_undone_and_read_by_hand(name: str) -> None:
    tensor = quantize_rtn(torch.randn(8, 96), grid_of(name), scale_dtype=torch.bfloat16)
    parts = form_of(name).pack(tensor)
    back = form_of(name).unpack(parts, grid_of(name))
    for field in ("integers", "zeros", "scales", "divisor"):
        one, other = getattr(tensor, field), getattr(back, field)
        assert (one is None and other is None) or (one.dtype == other.dtype and torch.equal(one.float(), other.float()))
    assert torch.equal(dense_weight("m", parts, "compressed-tensors"), tensor.dequantize())
    sizes = StoredGrid(8, 96, tensor.grid.bits, tensor.scales.shape[1])
    assert form_of(name).grid_of(parts) == sizes
    assert {suffix: tuple(part.shape) for suffix, part in parts.items()} == {
        suffix: shape for suffix, (_, shape) in form_of(name).shapes(sizes).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_unpacks_the_very_values(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    tensor = quantize_rtn(torch.randn(8, 96), grid_of(name), scale_dtype=torch.bfloat16)
    config = form_of(name).quantization_config(llama_map(layers=2), grid_of(name))
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    parts = form_of(name).pack(tensor)
    if name == "fp8":  # its products are rounded to the dtype of the scales
        parts["weight_scale"] = parts["weight_scale"].float()
    unpacked: Tensor = compressor.decompress(parts, scheme)["weight"]
    assert torch.equal(unpacked.float(), tensor.dequantize())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_by_transformers(tiny_model: Build, tmp_path: Path, name: str, method: str) -> None:
    loaded = load_model(str(model_of(tiny_model)))
    calibration = build_calibration(byte_tokenizer(), TEXTS, row_tokens=8) if method == "gptq" else None
    quantized = quantize_layers(
        loaded, (1,), method=method, grid=grid_of(name), overrides={"layers.2.down": "fp16"}, calibration=calibration
    )
    record = export(quantized, tmp_path / "out", texts=TEXTS)
    assert isinstance(record.reader_run, ReaderRun)
    assert record.reader_run.detail == "logits within 0 of the dequantized weights"
    assert set(record.quantized_modules.values()) == {grid_of(name).bits}
    assert record.grids == f"{name} {grid_of(name).groups} mse"
    state = read_dense_state(tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model(torch.tensor([[1, 2]]))  # which unpacks
    assert model.dtype == torch.bfloat16
    for module in record.quantized_modules:
        assert torch.equal(model.get_parameter(f"{module}.weight"), state[f"{module}.weight"].bfloat16()), module


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_layout(tiny_model: Build, tmp_path: Path, name: str) -> None:
    export(quantize_tiny(model_of(tiny_model), grid=grid_of(name)), tmp_path / "out", texts=TEXTS)
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    kinds = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    prefix = "model.layers.0.mlp.up_proj."
    assert {key.removeprefix(prefix): kinds[key]["dtype"] for key in kinds if key.startswith(prefix)} == SUFFIXES[name]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == {"fp8": "float-quantized"}.get(name, f"{name}-pack-quantized")
    assert "model.layers.1.mlp.up_proj" in config["ignore"]


def test_merged_modules_have_one_divisor_in_the_file(tiny_model: Build, tmp_path: Path) -> None:
    export(quantize_tiny(model_of(tiny_model), grid=grid_of("nvfp4")), tmp_path / "out", texts=TEXTS)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        divisors = {float(tensors[f"model.layers.0.{part}.weight_global_scale"]) for part in parts}
        assert len(divisors) == 1


MIXED: list[tuple[tuple[int, ...], Mapping[str, Precision]]] = [
    ((), {}),
    ((1,), {"layers.0.down": "fp16"}),
    ((), {"layers.1": "int8", "layers.2.qkv": "int8"}),
]


@pytest.mark.parametrize(("protected", "overrides"), MIXED)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_costs_what_its_tensors_weigh(
    tiny_model: Build, protected: tuple[int, ...], overrides: Mapping[str, Precision], name: str
) -> None:
    if name == "fp8" and "int8" in overrides.values():
        overrides = {unit: "fp16" for unit in overrides}
    grid, loaded = grid_of(name), load_model(str(model_of(tiny_model)))
    quantized = quantize_layers(loaded, protected, method="rtn", grid=grid, overrides=overrides)
    tensors = checkpoint_tensors(quantized, form_of(name))
    stored = sum(tensor.nbytes for key, tensor in tensors if not key.endswith(".weight_shape"))
    layer_bytes, other = count_bytes(loaded, grid)
    assert plan_bytes(layer_bytes, other, protected, overrides, quantized=grid.precision) == stored


@pytest.mark.parametrize("name", FP4)
def test_int8_beside_floats_of_4_bits_is_read_by_transformers(tiny_model: Build, tmp_path: Path, name: str) -> None:
    overrides: dict[str, Precision] = {"layers.0.down": "int8", "layers.2.qkv": "int8", "layers.2.o": "fp16"}
    quantized = quantize_tiny(model_of(tiny_model), grid=grid_of(name), overrides=overrides)
    record = export(quantized, tmp_path / "out", texts=TEXTS)
    assert isinstance(record.reader_run, ReaderRun)
    assert record.reader_run.detail == "logits within 0 of the dequantized weights"
    assert record.quantized_modules["model.layers.2.self_attn.q_proj"] == 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()][0] == "pack-quantized"
    assert verify(tmp_path / "out").complete


def test_a_changed_code_is_found(tiny_model: Build, tmp_path: Path) -> None:
    export(quantize_tiny(model_of(tiny_model), grid=grid_of("mxfp4")), tmp_path / "out", texts=TEXTS)
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        verify(tmp_path / "out")


BREAKS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.update(format="pack-quantized"), "format is 'pack-quantized'; expected: 'nvfp4-pack-quantized'"),
    (lambda c: c["config_groups"]["group_0"].update(targets=["x"]), "targets is"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32), "group_size is 32"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(type="int"), "type is 'int'; expected: 'float'"),
    (lambda c: c["config_groups"]["group_0"]["weights"].pop("scale_dtype"), "scale_dtype is 'missing'"),
    (lambda c: c.update(config_groups={}), "expected: a table of groups"),
    (lambda c: c["ignore"].append("model.layers.3"), "no linear module"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_metadata_that_says_something_else_is_named(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    modules = llama_map()
    form = form_of("nvfp4")
    config = form.quantization_config(modules, grid_of("nvfp4"))
    assert "scheme of compressed-tensors" in check_metadata(form, modules, config)
    broken = copy.deepcopy(config)
    damage(broken)
    [(rule, problems), *_] = metadata_problems(form, modules, broken)
    assert rule == "scheme of compressed-tensors"
    assert any(message in problem for problem in problems)


def test_a_target_that_is_no_int8_module_is_named() -> None:
    modules = llama_map(int8=(10,))
    form = form_of("mxfp4")
    config = form.quantization_config(modules, grid_of("mxfp4"))
    assert not list(form.scheme_problems(modules, config))
    config["config_groups"]["group_1"]["targets"].append("model.layers.2.mlp.up_proj")
    assert any("no module of 8 bits" in problem for problem in form.scheme_problems(modules, config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "gptq"}, "format 'gptq' has no place for the floats of scheme 'nvfp4'"),
        ({"format": "awq"}, "allowed is compressed-tensors"),
        ({"format": "gguf"}, "--scheme int"),
        ({"dtype": "float16"}, "stored in float16 is not read"),
        ({"reader": "gptqmodel"}, "gptqmodel was run in float16"),
        ({"reader": "sglang"}, "SGLang's rules for scheme 'nvfp4'"),
        ({"overrides": {"layers.0": "int6"}}, "other widths beside scheme 'nvfp4'"),
        ({"family": "mixtral"}, "experts of mixtral in scheme 'nvfp4'"),
    ],
)
def test_what_no_reader_takes_is_refused(options: dict[str, Any], message: str) -> None:
    family = options.pop("family", "llama")
    given = {"format": "compressed-tensors", "reader": "transformers", "dtype": "bfloat16"} | options
    with pytest.raises(UnsupportedModelError, match=message):
        check_exportable(family, grid=grid_of("nvfp4"), **given)


def test_what_is_read_is_not_refused() -> None:
    for name, dtype in (("fp8", "float16"), ("nvfp4", "bfloat16"), ("mxfp4", "bfloat16")):
        for reader in ("transformers", "vllm"):
            check_exportable("llama", format="compressed-tensors", grid=grid_of(name), reader=reader, dtype=dtype)
    check_exportable("llama", format="fp16-twin", grid=grid_of("nvfp4"), dtype="float16")
    with pytest.raises(UnsupportedModelError, match="int8 beside floats of 4 bits"):
        check_exportable(
            "llama", format="compressed-tensors", grid=grid_of("fp8"), overrides={"layers.0": "int8"}, dtype="float16"
        )


def test_vllm_is_not_run_on_a_cpu(tiny_model: Build, tmp_path: Path) -> None:
    export(quantize_tiny(model_of(tiny_model), grid=grid_of("fp8")), tmp_path / "out", texts=TEXTS)
    report = verify(tmp_path / "out")
    assert report.problems["vllm"] == ""
    assert report.notes["vllm"] == "its kernels for weights in FP8 or FP4 need a GPU; not run here"
    assert "not known here" in report.problems["sglang"]
    with pytest.raises(UnsupportedModelError, match="vllm is run on a CPU here"):
        verify(tmp_path / "out", reader="vllm", python=Path(sys.executable))
