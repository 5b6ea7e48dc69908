"""A model that is read block by block is exported to the same bytes as one in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import ExportRecord, Grid
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.quantize.calibration import build_calibration
from tests.export.build import TEXTS
from tests.planning import quantize_layers
from tests.tiny import byte_tokenizer

SYMMETRIC, ASYMMETRIC = Grid(group_size=32), Grid(group_size=32, symmetric=False)


def write(loaded: LoadedModel, out: Path, method: str, format_name: Any, columns: float) -> ExportRecord:
    calibration = None if method == "rtn" else build_calibration(byte_tokenizer(), TEXTS, row_tokens=8)
    grid = ASYMMETRIC if "awq" in (method, format_name) else SYMMETRIC
    quantized = quantize_layers(loaded, (1,), grid=grid, method=method, calibration=calibration, columns=columns)
    return export(quantized, out, texts=TEXTS, format=format_name)


@pytest.mark.parametrize(
    ("family", "method", "format_name", "columns"),
    [
        ("llama", "rtn", "compressed-tensors", 0.0),
        ("llama", "gptq", "compressed-tensors", 0.1),
        ("llama", "gptq", "gptq", 0.0),
        ("llama", "awq", "awq", 0.0),
        ("qwen2", "awq", "fp16-twin", 0.1),
        ("gpt2", "gptq", "fp16-twin", 0.0),
    ],
)
def test_the_files_are_those_of_the_model_in_memory(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, method: str, format_name: Any, columns: float
) -> None:
    folder = tiny_model(family, layers=2)
    ours = write(open_streamed(str(folder)), tmp_path / "ours", method, format_name, columns)
    theirs = write(load_model(str(folder)), tmp_path / "theirs", method, format_name, columns)
    assert ours.files == theirs.files  # with their checksums
    assert ours.quantized_modules == theirs.quantized_modules
