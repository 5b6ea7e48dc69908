"""Our independent reading of the files equals loops over single integers, and the quantizer's own values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.dequantize import iterate_dense, load_dense_model, read_dense_state
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.writer import export
from tests.export import foreign_folders as tools
from tests.export.build import TEXTS, quantize_tiny
from tests.export.conftest import Exported, rewrite_json

NAME = "model.layers.10.mlp.down_proj"
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column 8c + i of an awq word is nibble AWQ_NIBBLES[i]."""


def nibble(word: int, i: int) -> int:
    return (word % 2**32) // 16**i % 16


def from_gptq(stored: dict[str, torch.Tensor], n: int, k: int) -> float:
    u = nibble(int(stored[f"{NAME}.qweight"][k // 8, n]), k % 8)
    z = nibble(int(stored[f"{NAME}.qzeros"][k // 32, n // 8]), n % 8) + 1
    return (u - z) * float(stored[f"{NAME}.scales"][k // 32, n])


def from_awq(stored: dict[str, torch.Tensor], n: int, k: int) -> float:
    u = nibble(int(stored[f"{NAME}.qweight"][k, n // 8]), AWQ_NIBBLES[n % 8])
    z = nibble(int(stored[f"{NAME}.qzeros"][k // 32, n // 8]), AWQ_NIBBLES[n % 8])
    return (u - z) * float(stored[f"{NAME}.scales"][k // 32, n])


def from_compressed_tensors(stored: dict[str, torch.Tensor], n: int, k: int) -> float:
    u = nibble(int(stored[f"{NAME}.weight_packed"][n, k // 8]), k % 8)
    return (u - 8) * float(stored[f"{NAME}.weight_scale"][n, k // 32])


@pytest.mark.parametrize(
    ("format_name", "value"),
    [("compressed-tensors", from_compressed_tensors), ("gptq", from_gptq), ("awq", from_awq)],
)
def test_a_module_equals_a_loop_over_its_integers(
    exported: Exported, format_name: str, value: Callable[[dict[str, torch.Tensor], int, int], float]
) -> None:
    folder = exported("llama", format_name)
    stored = load_file(folder / "model.safetensors")
    weight = read_dense_state(folder)[f"{NAME}.weight"]
    assert weight.shape == (32, 64)
    for n in range(0, 32, 5):
        for k in range(0, 64, 3):
            assert float(weight[n, k]) == value(stored, n, k)


@pytest.mark.parametrize(
    ("family", "format_name"),
    [("llama", "awq")] + [(f, n) for f in ("llama", "gpt2", "gpt_neox") for n in ("compressed-tensors", "gptq")],
)
def test_the_files_say_what_was_quantized(
    exported: Exported, tiny_model: Callable[..., Path], family: str, format_name: str
) -> None:
    folder = exported(family, format_name, "vllm")
    quantized = quantize_tiny(tiny_model(family, layers=12))
    source = load_file(tiny_model(family, layers=12) / "model.safetensors")
    state = read_dense_state(folder)
    dense = {f"{name}.weight": weight for name, weight in quantized.dense_weights().items()}
    assert len(dense) == len(quantized.tensors) > 40
    assert state.keys() == source.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, dense.get(name, source[name].float())), name


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (Grid(group_size=32, symmetric=False), "float16"),
        (Grid(group_size=-1), "bfloat16"),
        (Grid(group_size=-1, symmetric=False), "bfloat16"),
        (Grid(group_size=64), "float16"),
    ],
)
def test_other_grids_and_dtypes_load_in_transformers_and_here(
    tiny_model: Callable[..., Path], tmp_path: Path, grid: Grid, dtype: str
) -> None:
    quantized = quantize_tiny(tiny_model("llama", layers=2, dtype=dtype), protected=(0,), grid=grid)
    record = export(quantized, tmp_path / "out", texts=TEXTS)  # verifies the logits
    state = read_dense_state(tmp_path / "out")
    for name, weight in quantized.dense_weights().items():
        assert torch.equal(state[f"{name}.weight"], weight)
    assert set(record.kept_modules) == {name for name in quantized.kept}


def test_tensors_come_one_at_a_time(exported: Exported) -> None:
    iterator = iterate_dense(exported())
    assert next(iterator)[1].dtype == torch.float32
    assert dict(iterate_dense(exported())).keys() == read_dense_state(exported()).keys()


@pytest.mark.parametrize(
    ("format_name", "tool"),
    [
        ("gptq", tools.gptqmodel),
        ("gptq", tools.autoround_gptq),
        ("gptq", tools.autogptq),
        ("awq", tools.autoround_awq),
        ("awq", tools.autoawq),
    ],
)
def test_folders_of_other_tools_read_as_ours_did(
    exported: Exported, damaged: Exported, format_name: str, tool: Callable[[Path], None]
) -> None:
    ours, folder = read_dense_state(exported("llama", format_name)), damaged("llama", format_name)
    tool(folder)
    theirs = read_dense_state(folder)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_checkpoint_of_autoscheme_has_the_width_that_each_module_is_stored_in(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    quantized = quantize_tiny(tiny_model("llama", layers=2), protected=(), overrides={"layers.0.qkv": "int8"})
    export(quantized, folder, texts=TEXTS, format="gptq", reader="vllm")
    wide = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    tools.autoround_mixed(folder, wide)
    words = {name: len(value) for name, value in load_file(folder / "model.safetensors").items() if "qweight" in name}
    assert words[f"{wide[0]}.qweight"] == 2 * words["model.layers.1.self_attn.q_proj.qweight"]
    state = read_dense_state(folder)
    for name, weight in quantized.dense_weights().items():
        assert torch.equal(state[f"{name}.weight"], weight)


@pytest.mark.parametrize(
    ("format_name", "name", "content"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_metadata_only_in_a_tools_own_file_is_found(
    exported: Exported, damaged: Exported, format_name: str, name: str, content: dict[str, Any]
) -> None:
    ours, folder = read_dense_state(exported("llama", format_name)), damaged("llama", format_name)
    tools.write(folder, {})
    rewrite_json(folder / "config.json", lambda config: config.pop("quantization_config"))
    rewrite_json_new(folder / name, content)
    assert torch.equal(read_dense_state(folder)[f"{NAME}.weight"], ours[f"{NAME}.weight"])


def rewrite_json_new(path: Path, content: dict[str, Any]) -> None:
    path.write_text("{}")
    rewrite_json(path, lambda empty: empty.update(content))


def test_version_2_of_gptq_stores_zero_points_as_they_are(exported: Exported, damaged: Exported) -> None:
    ours, folder = read_dense_state(exported("llama", "gptq")), damaged("llama", "gptq")
    tools.gptqmodel(folder)
    tools.change_metadata(folder, checkpoint_format="gptq_v2")
    tools.change_tensors(folder, lambda t: t.update({n: v + 0x11111111 for n, v in t.items() if n.endswith(".qzeros")}))
    theirs = read_dense_state(folder)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_act_order_is_followed_through_the_group_indices(damaged: Exported) -> None:
    folder = damaged("llama", "gptq")
    tools.gptqmodel(folder)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    before = read_dense_state(folder)[f"{NAME}.weight"]
    scales = load_file(folder / "model.safetensors")[f"{NAME}.scales"].float()
    group = torch.arange(64) // 32
    tools.change_tensors(folder, lambda t: t.update({f"{NAME}.g_idx": group[order].int()}))
    after = read_dense_state(folder)[f"{NAME}.weight"]
    for k in range(0, 64, 7):
        expected = before[:, k] / scales[group[k]] * scales[group[order[k]]]
        assert torch.allclose(after[:, k], expected, rtol=1e-5, atol=0)


def test_a_bias_that_the_model_does_not_have_must_be_zero(damaged: Exported) -> None:
    folder = damaged("llama", "gptq")
    tools.change_tensors(folder, lambda t: t.update({f"{NAME}.bias": torch.zeros(32).half()}))
    assert f"{NAME}.bias" not in read_dense_state(folder)
    tools.change_tensors(folder, lambda t: t.update({f"{NAME}.bias": torch.eye(32)[5].half()}))
    with pytest.raises(ArtifactError, match=rf"{NAME}\.bias is not zero, and the model has no such bias"):
        read_dense_state(folder)


def test_activation_scales_of_ones_are_skipped_and_others_are_applied(exported: Exported, damaged: Exported) -> None:
    ours, folder = read_dense_state(exported("bloom", "awq")), damaged("bloom", "awq")
    name, module = "transformer.h.3.mlp.gelu_impl.scales", "transformer.h.3.mlp.dense_4h_to_h.weight"
    tools.change_tensors(folder, lambda t: t.update({name: torch.full((128,), 2.0).half()}))
    theirs = read_dense_state(folder)
    assert name not in theirs
    assert torch.equal(theirs[module], ours[module] / 2)
    assert all(torch.equal(theirs[other], ours[other]) for other in ours if other != module)


def test_activation_scales_that_nothing_follows_are_refused(damaged: Exported) -> None:
    folder = damaged("bloom", "awq")
    name = "transformer.h.3.mlp.gelu_impl.scales"
    tools.change_tensors(folder, lambda t: t.update({name: torch.full((7,), 2.0).half()}))
    with pytest.raises(UnsupportedModelError, match="scales an activation, and 0 modules could follow it"):
        read_dense_state(folder)


@pytest.mark.parametrize(
    ("format_name", "change", "message"),
    [
        ("gptq", {"quant_method": "quanto"}, "quant_method 'quanto' cannot be dequantized"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' cannot be dequantized"),
        ("awq", {"version": "GEMV"}, "awq version 'GEMV' cannot be dequantized"),
    ],
)
def test_other_formats_are_refused(damaged: Exported, format_name: str, change: dict[str, Any], message: str) -> None:
    folder = damaged("llama", format_name)
    tools.change_metadata(folder, **change)
    with pytest.raises(UnsupportedModelError, match=message):
        read_dense_state(folder)


def test_a_config_that_describes_no_model_is_an_artifact_error(damaged: Exported) -> None:
    folder = damaged()
    rewrite_json(folder / "config.json", lambda c: c.update(model_type="no-such-model"))
    with pytest.raises(ArtifactError, match="describes no model that can be built"):
        load_dense_model(folder)
