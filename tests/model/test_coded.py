"""Weights of 8 and 4 bits against a naive reading of every single number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.reading import read_rows, read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model, tensor_shapes
from quant_fairness_plugin.model.source_format import source_format
from quant_fairness_plugin.model.streamed import open_streamed
from tests.export.build import TEXTS, quantize_tiny
from tests.tiny import write_tiny_model

BLOCK = (24, 16)
"""Neither divides the rows and columns of the tiny model."""
BLOCKWISE = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": strategy} | weights, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


CASES = {
    "block": (BLOCKWISE, "weight_scale_inv"),
    "channel": (compressed("channel"), "weight_scale"),
    "tensor": (compressed("tensor"), "weight_scale"),
    "row": ({"quant_method": "fbgemm_fp8"}, "weight_scale"),
}


def scales_of(weight: Tensor, kind: str) -> Tensor:
    rows, cols = weight.shape
    if kind == "block":
        shape: tuple[int, ...] = (math.ceil(rows / BLOCK[0]), math.ceil(cols / BLOCK[1]))
    else:
        shape = {"channel": (rows, 1), "tensor": (1,), "row": (rows,)}[kind]
    return torch.rand(shape) * 0.01 + 0.001


def naive(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Number by number: the code as a float times its scale, rounded to bfloat16."""
    numbers, result = codes.float(), torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            place = {"block": (i // BLOCK[0], j // BLOCK[1]), "channel": (i, 0), "tensor": (0,), "row": (i,)}[kind]
            result[i, j] = numbers[i, j] * scale[place]
    return result.bfloat16()


def write_float8(folder: Path, kind: str) -> dict[str, Tensor]:
    """Store the linear modules of a tiny Llama in FP8; returns their weights as they have to be read."""
    write_tiny_model(folder, "llama", layers=2, width=40, dtype="bfloat16")
    config, suffix = CASES[kind]
    path = folder / "model.safetensors"
    tensors, expected = load_file(path), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = scales_of(tensors[name], kind)
        codes = (tensors[name].float() * 400).clamp(-448, 448).to(torch.float8_e4m3fn)
        if name.startswith("model.layers.1") and name.endswith(("q_proj.weight", "up_proj.weight")):
            expected[name] = naive(codes, scale, kind)  # a loop over every number, which takes its time
        tensors |= {name: codes, f"{name.removesuffix('weight')}{suffix}": scale}
        tensors[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1)
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return expected


@pytest.mark.parametrize("kind", CASES)
def test_float8_weights_are_read_as_naively(kind: str, tmp_path: Path) -> None:
    expected = write_float8(tmp_path, kind)
    files = resolve_model(str(tmp_path))
    places = find_tensors(files)
    assert places.keys() == tensor_shapes(files).keys()
    for name, value in expected.items():
        assert torch.equal(read_tensor(places[name]), value)
        assert torch.equal(read_rows(places[name], [1, 2, 25]), value[[1, 2, 25]])
        assert tensor_shapes(files)[name] == ("BF16", tuple(value.shape))
    assert not any("scale" in name for name in places)


def test_a_float8_model_is_loaded_streamed_and_planned_in_bfloat16(tmp_path: Path) -> None:
    expected = write_float8(tmp_path, "block")
    loaded, streamed = load_model(str(tmp_path)), open_streamed(str(tmp_path))
    assert loaded.storage_dtype == streamed.storage_dtype == torch.bfloat16
    for name, value in expected.items():
        assert torch.equal(loaded.model.get_parameter(name), value.float())
        assert torch.equal(streamed.fetch(1)[name], value)
    outline = outline_model(resolve_model(str(tmp_path)))
    assert outline.parameters == loaded.parameters
    assert outline.family.name == "llama"


def test_an_export_says_what_its_16_bit_model_was(tmp_path: Path) -> None:
    write_float8(tmp_path / "source", "block")
    quantized = quantize_tiny(tmp_path / "source", protected=(1,), grid=Grid(group_size=-1))
    record = export(quantized, tmp_path / "out", texts=TEXTS, format="fp16-twin")
    assert record.provenance.source == "dequantized from FP8 and rounded to bfloat16"
    assert record.copied_tensors == {}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("shape", [(3, 2), (40, 2), (2,)])
def test_scales_that_do_not_fit_are_an_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_float8(tmp_path, "block")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | {"model.layers.1.self_attn.q_proj.weight_scale_inv": torch.ones(shape)}
    save_file(tensors, path, {"format": "pt"})
    for load in (load_model, open_streamed):
        with pytest.raises(ArtifactError, match=r"q_proj\.weight_scale_inv is .*expected one scale"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        compressed("group", num_bits=4, type="int"),
        compressed("group", num_bits=4),
    ],
)
def test_other_quantized_models_stay_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    write_tiny_model(tmp_path, "llama")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    assert source_format(settings | {"quantization_config": config}) is None
    with pytest.raises(UnsupportedModelError, match=f"already quantized \\({config['quant_method']}\\)"):
        resolve_model(str(tmp_path))


def test_float8_without_a_scale_is_refused(tmp_path: Path) -> None:
    write_float8(tmp_path, "block")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight_scale_inv"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(model\.layers\.1\.self_attn\.q_proj\.weight"):
        resolve_model(str(tmp_path))


def test_mxfp4_weights_are_read_as_naively(tmp_path: Path) -> None:
    config = GptOssConfig(
        num_hidden_layers=1, hidden_size=64, intermediate_size=32, num_local_experts=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=90, layer_types=["full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 64, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (3, 64, 2), dtype=torch.uint8)
    path = tmp_path / "model.safetensors"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, path)
    settings = {"quantization_config": {"quant_method": "mxfp4"}}
    place = find_tensors(ModelFiles("m", tmp_path, settings, (path,), 1, None))[name]
    assert place.shape == tuple(model.state_dict()[name].shape)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    expected = torch.empty(place.shape)
    for expert in range(3):
        for row in range(0, 64, 7):
            for column in range(64):
                byte = int(blocks[expert, row, column // 32, column % 32 // 2])
                code = byte >> 4 if column % 2 else byte & 15
                sign = -1 if code >= 8 else 1
                exponent = int(scales[expert, row, column // 32]) - 127
                expected[expert, column, row] = sign * values[code % 8] * 2.0**exponent
    found = read_tensor(place)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, :, ::7].float(), expected[:, :, ::7])
    assert torch.equal(read_rows(place, [2]), found[[2]])
