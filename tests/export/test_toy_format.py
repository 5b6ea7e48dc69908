"""A new checkpoint format costs one class and one line of the registry: exported, verified, read by Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quant_fairness_kernels.packing import CompressedTensors, pack_compressed_tensors, unpack_compressed_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.checkpoint.folder import RECORD, file_record, load_record
from quant_fairness_plugin.checkpoint.formats import FORMATS
from quant_fairness_plugin.checkpoint.formats.format import (
    Format,
    Quantization,
    Shape,
    StoredGrid,
    TensorKind,
    wrong_fields,
)
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers.transformers import wants_unpacked_zeros
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from tests.export.build import TEXTS, quantize_tiny
from tests.export.conftest import rewrite_json

if TYPE_CHECKING:
    from quant_fairness_plugin.artifacts import ExportRecord

pytestmark = pytest.mark.skipif(
    wants_unpacked_zeros(),
    reason="the toy is asymmetric compressed-tensors; runs with a Transformers that loads these, as 5.22 does",
)


class ToyFormat(Format):
    """As `compressed-tensors`, but zero points are always stored, and nothing is 8 bit."""

    name = "toy"
    method = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    widths = (4,)
    zeros = "weight_zero_point"

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        return {
            "weight_packed": ("I32", (grid.rows, grid.words(grid.cols))),
            "weight_scale": (None, (grid.rows, grid.groups)),
            "weight_shape": ("I64", (2,)),
            "weight_zero_point": ("I32", (grid.words(grid.rows), grid.groups)),
        }

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        rows, cols = parts["weight_shape"].tolist()
        return rows, cols

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        return shapes["weight_packed"][1], cols, shapes["weight_scale"][1]

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        packed = pack_compressed_tensors(tensor.integers, tensor.scales, tensor.zeros, bits=4, symmetric=False)
        return {suffix: value for suffix, value in packed._asdict().items() if value is not None}

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        integers, scales, zeros = unpack_compressed_tensors(CompressedTensors(**parts), bits=4)
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        return FORMATS["compressed-tensors"].quantization_config(modules, replace(grid, symmetric=False))

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        yield from wrong_fields(quantization, {"quant_method": self.method, "format": "pack-quantized"})


@pytest.fixture
def toy(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, ExportRecord]:
    monkeypatch.setitem(FORMATS, "toy", ToyFormat())  # the one line
    quantized = quantize_tiny(tiny_model("llama", layers=4))
    record = export(quantized, tmp_path / "out", texts=TEXTS, format="toy")
    return tmp_path / "out", record


def test_it_is_exported_verified_and_read_back(toy: tuple[Path, ExportRecord], tiny_model: Callable[..., Path]) -> None:
    folder, record = toy
    report = verify(folder)
    assert report.complete  # with the logits of a real Transformers
    assert report.format == record.format == load_record(folder).format == "toy"
    module = "model.layers.2.mlp.down_proj"
    stored = load_file(folder / "model.safetensors")
    assert stored[f"{module}.weight_zero_point"].dtype == torch.int32
    tensor = quantize_tiny(tiny_model("llama", layers=4)).tensors[module]
    assert torch.equal(ToyFormat().read_back(module, stored, tensor.grid).integers, tensor.integers)
    assert torch.equal(read_dense_state(folder)[f"{module}.weight"], tensor.dequantize())


def test_its_own_shapes_and_scheme_are_checked(toy: tuple[Path, ExportRecord]) -> None:
    folder, _ = toy
    rewrite_json(folder / "config.json", lambda c: c["quantization_config"].update(format="dense"))
    record_again(folder, "config.json")
    with pytest.raises(ArtifactError, match=r"format is 'dense'; expected: 'pack-quantized' \(scheme of toy\)"):
        verify(folder)
    rewrite_json(folder / "config.json", lambda c: c["quantization_config"].update(format="pack-quantized"))
    name = "model.layers.2.mlp.down_proj.weight_zero_point"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensors[name][:1]}, folder / "model.safetensors", metadata={"format": "pt"})
    record_again(folder, "config.json", "model.safetensors")
    with pytest.raises(ArtifactError, match=rf"{name} is \('I32', \(1, 2\)\), expected \('I32', \(4, 2\)\)"):
        verify(folder)


def test_its_refusals_hold_and_without_its_line_it_is_unknown(
    toy: tuple[Path, ExportRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = toy
    with pytest.raises(UnsupportedModelError, match="m has 8 bits; toy checkpoints hold 4 only"):
        ToyFormat().check_module("m", StoredGrid(8, 32, 8, 1))
    monkeypatch.delitem(FORMATS, "toy")
    with pytest.raises(ArtifactError, match="format 'toy' is unknown; known are compressed-tensors"):
        verify(folder)


def record_again(folder: Path, *names: str) -> None:
    """Make the checksums fit, so that the later checks have to see the change."""
    content = json.loads((folder / RECORD).read_text())
    for name in names:
        file = file_record(folder / name)
        content["files"][name] = {"bytes_": file.bytes_, "sha256": file.sha256}
    (folder / RECORD).write_text(json.dumps(content))
