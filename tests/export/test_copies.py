"""Tensors that no module of a model has, through an export: copied, recorded, checked, and left alone by readers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.artifacts import CheckpointFormat
from quant_fairness_plugin.export.writer import export
from tests.export.build import TEXTS, quantize_tiny
from tests.tiny import write_tiny_model

EXTRA = ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight", "mtp.fc.weight")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers with a fourth one and a head that predict further tokens, some of it in float32."""
    folder = tmp_path_factory.mktemp("source")
    write_tiny_model(folder, "llama", layers=3)
    path = folder / "model.safetensors"
    extra = {name: torch.randn(32, 32) for name in EXTRA} | {"mtp.norm.weight": torch.full((3,), torch.inf).half()}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    return folder


# `export` compares the first two with what Transformers reads: unexpected tensors must not be an error there.
@pytest.mark.parametrize("layout", ["compressed-tensors", "fp16-twin", "gptq"])
def test_they_are_copied_byte_for_byte(
    source: Path, tmp_path: Path, layout: CheckpointFormat, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        record = export(quantize_tiny(source), tmp_path / "out", texts=TEXTS, format=layout)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(record.copied_tensors) == {*EXTRA, "mtp.norm.weight"}
    for name in record.copied_tensors:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert "4 tensors are copied unread, 4 of them belong to no module" in caplog.text
    assert "(model.layers.3, mtp)" in caplog.text
    quantization = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    if layout == "compressed-tensors":
        assert {r"re:model\.layers\.3(\..*)?$", r"re:mtp(\..*)?$"} <= set(quantization["ignore"])
    if layout == "gptq":
        assert {r"-:^model\.layers\.3\..*", r"-:^mtp\..*"} <= set(quantization["dynamic"])


def test_a_model_without_them_has_no_copies(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    record = export(quantize_tiny(tiny_model("llama", layers=3)), tmp_path / "out", texts=TEXTS)
    assert record.copied_tensors == {}
