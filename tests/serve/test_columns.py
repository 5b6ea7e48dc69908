"""16-bit input channels beside the 4-bit body: every kernel adds them, and gives the quantized model in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_fairness_plugin.artifacts import CheckpointFormat
from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.serve.load import load_quantized
from tests.export.build import TEXTS, quantize_with_columns

ROW = torch.arange(1, 18).unsqueeze(0)
CASES = [("llama", "compressed-tensors", "gptq"), ("gpt2", "gptq", "gptq"), ("llama", "awq", "awq")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join(case))
def case(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizedModel]:
    family, format_name, method = request.param
    return build(tiny_model(family), tmp_path_factory.mktemp("columns") / "out", format_name, method)


def build(source: Path, out: Path, format_name: CheckpointFormat, method: Any) -> tuple[Path, QuantizedModel]:
    quantized = quantize_with_columns(source, method=method)
    export(quantized, out, texts=TEXTS, format=format_name, reader="vllm")
    return out, quantized


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=ROW).logits
    return found.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_reference_is_the_quantized_model_in_memory(case: tuple[Path, QuantizedModel]) -> None:
    out, quantized = case
    with swapped(quantized.loaded, quantized.dense_weights()) as model:
        expected = logits(model)
    # AWQ's folded biases and norms are exact; only the order of additions can differ
    assert difference(logits(load_quantized(out, kernel="reference")), expected) < 1e-5
    assert difference(logits(load_dense_model(out)), expected) > 1e-3


def test_the_cpu_path_computes_the_same(case: tuple[Path, QuantizedModel]) -> None:
    expected = logits(load_quantized(case[0], kernel="reference"))
    exact = load_quantized(case[0], kernel="cpu", dtype=torch.float32)
    assert difference(logits(exact), expected) < 1e-5
    # bfloat16 keeps 8 bits, 0.4 % a step, over two layers; see test_load
    assert difference(logits(load_quantized(case[0], kernel="cpu")), expected) < 0.05


def test_modules_that_are_dequantized_get_them_too(
    case: tuple[Path, QuantizedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_quantized(case[0], kernel="reference"))
    monkeypatch.setattr("quant_fairness_plugin.serve.load.reason_against", lambda parts, layout: "the test says so")
    found = logits(load_quantized(case[0], kernel="cpu", dtype=torch.float32))
    assert difference(found, expected) < 1e-5


def test_the_triton_kernels_add_them_in_the_same_launch(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    out, _ = build(tiny_model("gpt2"), tmp_path / "out", "gptq", "gptq")
    script, environment = Path(__file__).with_name("interpreted.py"), os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # float16, as in test_interpreted
    assert result["difference"] < 0.005
    without = difference(logits(load_dense_model(out)), logits(load_quantized(out, kernel="reference")))
    assert without > 0.02
    assert result["modules"] == 4


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_channels_that_the_model_does_not_have_are_refused(
    case: tuple[Path, QuantizedModel], tmp_path: Path, kernel: Any
) -> None:
    out = Path(shutil.copytree(case[0], tmp_path / "copy"))
    tensors = load_file(out / COLUMNS_FILE)
    name = next(key for key in tensors if key.endswith(".idx"))
    tensors[name][-1] = 10_000
    save_file(tensors, out / COLUMNS_FILE)
    with pytest.raises(ArtifactError, match="has channels up to 10000"):
        load_quantized(out, kernel=kernel)


def test_channels_of_a_protected_module_are_refused(case: tuple[Path, QuantizedModel], tmp_path: Path) -> None:
    out = Path(shutil.copytree(case[0], tmp_path / "copy"))
    tensors = load_file(out / COLUMNS_FILE)
    save_file({name.replace(".0.", ".1."): tensor for name, tensor in tensors.items()}, out / COLUMNS_FILE)
    with pytest.raises(ArtifactError, match="is no quantized module"):
        load_quantized(out, kernel="cpu")
