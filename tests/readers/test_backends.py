"""Real gptqmodel and llm-compressor behind our commands: the plan, the numbers, silence, a checkpoint that verifies."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.export.verify import verify
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.readers

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-gptqmodel" / "bin" / "python"
BITS = {"layers.1": "fp16", "layers.2": "int8", "layers.3.down": "fp16"}
"""A whole layer and a single fusion group in 16 bit, and a layer in 8."""
LINEARS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
EXPECTED = {
    f"model.layers.{i}.{name}": 8 if i == 2 else 4
    for i in range(4)
    for name in LINEARS
    if i != 1 and (i, name) != (3, "mlp.down_proj")
}


def run(folder: Path, backend: str, method: str, units: dict[str, str]) -> dict[str, Any]:
    if not (ROOT / ".venv-gptqmodel" / ".installed").exists():
        pytest.skip(".venv-gptqmodel is not built; `make test-readers` builds it")
    model = folder / "model"
    write_tiny_model(model, "llama", layers=4, width=128)
    request, result = folder / "request.json", folder / "result.json"
    asked = {"model": str(model), "out": str(folder / "out"), "backend": backend, "method": method, "units": units}
    request.write_text(json.dumps(asked), encoding="utf-8")
    script = Path(__file__).with_name("backend_runner.py")
    command = [PYTHON, script, request, result]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=1800)
    assert done.returncode == 0, f"{backend} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer


@pytest.mark.parametrize("backend", ["gptqmodel", "llmcompressor"])
def test_gptq_by_another_tool_is_the_plan_its_numbers_and_nothing_else(backend: str, tmp_path: Path) -> None:
    answer = run(tmp_path, backend, "gptq", BITS)
    assert answer["different"] == answer["folded"] == answer["left"] == []
    assert answer["printed"] == ""
    assert answer["quantized"] == EXPECTED
    assert answer["recipe"] == EXPECTED
    assert backend in answer["versions"]
    assert verify(tmp_path / "out", reader="transformers").complete


@pytest.mark.parametrize("backend", ["gptqmodel", "llmcompressor"])
def test_awq_by_another_tool_folds_into_the_blocks_only(backend: str, tmp_path: Path) -> None:
    answer = run(tmp_path, backend, "awq", {"layers.1": "fp16"})
    assert answer["different"] == answer["left"] == []
    assert {name for name in answer["quantized"] if ".1." in name} == set()
    assert "model.layers.0.input_layernorm.weight" in answer["folded"]
    assert verify(tmp_path / "out", reader="transformers").complete


def test_the_command_prints_its_result_and_nothing_else(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model", "llama", layers=3, width=128)
    code = "from quant_fairness_plugin.cli.main import main; main()"
    options = ["--backend", "llmcompressor", "--protect-layers", "1", "--group-size", "32", "--langs", "en,he"]
    arguments = ["quantize", "model", *options, "--output", "out", "--json"]
    command = [PYTHON, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["provenance"]["arguments"]["backend"] == "llmcompressor"
