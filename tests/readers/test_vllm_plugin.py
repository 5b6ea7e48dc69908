"""Our kernels inside the real vLLM (CPU build), when asked for with `--quantization quant_fairness`, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import CheckpointFormat, Grid
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.checkpoint.readers.compare import compare_reading, fixed_prompts
from quant_fairness_plugin.checkpoint.readers.running import Reading, reader_script
from quant_fairness_plugin.export.writer import export
from tests.export.build import TEXTS, quantize_tiny, quantize_with_columns
from tests.readers.session import ENVIRONMENT, skip_without_int4_kernel
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
OURS = "QuantFairnessLinearMethod"
pytestmark = pytest.mark.readers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, the smallest that vLLM's attention takes on a CPU."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder, "llama", layers=2, width=128)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As if this package were installed in vLLM's environment: its modules and its entry points, from pyproject."""
    installed = tmp_path_factory.mktemp("installed")
    metadata = installed / "quant_fairness-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: quant-fairness\nVersion: 0\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["vllm.general_plugins"]
    lines = [f"{name} = {target}\n" for name, target in points.items()]
    (metadata / "entry_points.txt").write_text("".join(["[vllm.general_plugins]\n", *lines]))
    paths = [str(installed), str(ROOT), str(ROOT / "kernels")]  # the first one shadows metadata of a checkout
    return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}


def read(folder: Path, work: Path, environment: dict[str, str], quantization: str | None) -> Reading:
    request: dict[str, Any] = {"prompts": fixed_prompts(load_dense_model(folder)), "quantization": quantization}
    (work / "request.json").write_text(json.dumps(request))
    command = [PYTHON, reader_script("vllm"), folder, work / "request.json", work / "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads((work / "answer.json").read_text())
    return Reading("vllm", answer["version"], answer["methods"], tuple(answer["sequences"]))


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq"])
def test_asked_for_it_computes_what_the_files_say(
    model: Path, tmp_path: Path, environment: dict[str, str], format_name: CheckpointFormat
) -> None:
    quantized = quantize_tiny(model, grid=Grid(group_size=32, symmetric=format_name != "awq"))
    export(quantized, tmp_path / "out", texts=TEXTS, format=format_name, reader="vllm")
    reading = read(tmp_path / "out", tmp_path, environment, "quant_fairness")
    assert {method for name, method in reading.methods.items() if ".layers.0." in name} == {OURS}
    assert {method for name, method in reading.methods.items() if ".layers.1." in name} == {"UnquantizedLinearMethod"}
    found = compare_reading(reading, load_dense_model(tmp_path / "out"))
    assert found.agrees, found


def test_not_asked_for_it_does_nothing_and_vllm_overlooks_the_side_file(
    model: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    skip_without_int4_kernel()
    quantized = quantize_with_columns(model)
    export(quantized, tmp_path / "out", texts=TEXTS, reader="vllm")
    reading = read(tmp_path / "out", tmp_path, environment, None)
    assert OURS not in reading.methods.values()
    found = compare_reading(reading, load_dense_model(tmp_path / "out"))
    assert found.agrees, found
