"""Our independent reading of the files equals loops over single integers, and the quantizer's own values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.dequantize import iterate_dense, load_dense_model, read_dense_state
from quant_fairness_plugin.export.writer import export
from tests.export.build import TEXTS, plan_of, quantize_tiny
from tests.export.conftest import Exported, rewrite_json


def nibble(word: int, i: int) -> int:
    return (word % 2**32) // 16**i % 16


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
def test_a_module_equals_a_loop_over_its_integers(exported: Exported, format_name: str) -> None:
    folder = exported("llama", format_name)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.10.mlp.down_proj"
    weight = read_dense_state(folder)[f"{name}.weight"]
    assert weight.shape == (32, 64)
    for n in range(0, 32, 5):
        for k in range(0, 64, 3):
            if format_name == "gptq":
                u = nibble(int(stored[f"{name}.qweight"][k // 8, n]), k % 8)
                z = nibble(int(stored[f"{name}.qzeros"][k // 32, n // 8]), n % 8) + 1
                s = float(stored[f"{name}.scales"][k // 32, n])
            else:
                u = nibble(int(stored[f"{name}.weight_packed"][n, k // 8]), k % 8)
                z, s = 8, float(stored[f"{name}.weight_scale"][n, k // 32])
            assert float(weight[n, k]) == (u - z) * s


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
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
    record = export(quantized, tmp_path / "out", plan=plan_of(quantized), texts=TEXTS)  # verifies the logits
    state = read_dense_state(tmp_path / "out")
    for name, weight in quantized.dense_weights().items():
        assert torch.equal(state[f"{name}.weight"], weight)
    assert set(record.kept_modules) == {name for name in quantized.kept}


def test_tensors_come_one_at_a_time(exported: Exported) -> None:
    iterator = iterate_dense(exported())
    assert next(iterator)[1].dtype == torch.float32
    assert dict(iterate_dense(exported())).keys() == read_dense_state(exported()).keys()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(quant_method="awq"), UnsupportedModelError, "quant_method 'awq' cannot be dequantized"),
        (lambda c: c.update(checkpoint_format="gptq_v2"), UnsupportedModelError, "only gptq version 1"),
    ],
)
def test_other_formats_are_refused(
    damaged: Exported, change: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    folder = damaged("llama", "gptq")
    rewrite_json(folder / "config.json", lambda c: change(c["quantization_config"]))
    with pytest.raises(error, match=message):
        read_dense_state(folder)


def test_a_config_that_describes_no_model_is_an_artifact_error(damaged: Exported) -> None:
    folder = damaged()
    rewrite_json(folder / "config.json", lambda c: c.update(model_type="no-such-model"))
    with pytest.raises(ArtifactError, match="describes no model that can be built"):
        load_dense_model(folder)
