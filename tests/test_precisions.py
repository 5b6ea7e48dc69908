"""Precisions by name: their order, and four bits in groups of 32 from the plan to the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from quant_fairness_plugin.artifacts import (
    FINE_GROUPS,
    Grid,
    Precision,
    bits_of_precision,
    precision_order,
    precision_words,
)
from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.checkpoint.readers import find_refusal
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.quantize.grid import quantize_rtn
from tests.export.build import TEXTS
from tests.planning import quantize_layers

GRID = Grid(group_size=64, clip="mse")
UNITS: dict[str, Precision] = {"layers.0.qkv": FINE_GROUPS, "layers.1.down": "int8", "layers.1.o": FINE_GROUPS}


def test_precisions_are_ordered_by_what_a_weight_takes() -> None:
    integers = [kind for kind in get_args(Precision) if kind.startswith(("int", "fp16"))]
    assert sorted(integers, key=precision_order) == [
        "int2", "int3", "int4", "int4g32", "int5", "int6", "int8", "fp16",
    ]  # fmt: skip
    assert [bits_of_precision(kind) for kind in ("int4g32", "nvfp4", "fp16", "int8")] == [4, 4, 16, 8]
    assert precision_words("int4g32") == "4 bit in groups of 32"
    assert precision_words("int8") == "8 bit"


@pytest.mark.parametrize("symmetric", [True, False])
def test_its_grid_is_the_models_with_smaller_groups(symmetric: bool) -> None:
    grid = Grid(group_size=128, symmetric=symmetric, clip="mse")
    assert grid.at("int4g32") == Grid(group_size=32, symmetric=symmetric, clip="mse")
    assert Grid(bits=3).at("int4g32") == Grid(bits=4, group_size=32)


def test_units_in_smaller_groups_are_written_and_read_as_they_were_quantized(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = load_model(str(tiny_model("llama", layers=2, width=64)))
    quantized = quantize_layers(loaded, (), method="rtn", grid=GRID, overrides=UNITS)
    record = export(quantized, tmp_path / "out", texts=TEXTS)
    assert all(check.outcome == "passed" for check in verify(tmp_path / "out").checks)
    checkpoint = open_checkpoint(tmp_path / "out")
    for layer in range(2):
        for name, module in loaded.linears(layer).items():
            unit = next(unit.name for unit in loaded.family.units_of(layer) if name.endswith(unit.modules))
            grid = GRID.at(UNITS.get(f"layers.{layer}.{unit}", "int4"))
            assert record.sizes[name] == grid.group_size
            expected = quantize_rtn(linear_weight(module), grid, scale_dtype=torch.float16).dequantize()
            torch.testing.assert_close(checkpoint.dense(name), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "form", "reader", "message"),
    [
        ("llama", "awq", None, "holds one group size"),
        ("llama", "compressed-tensors", "sglang", "would take a wrong group size"),
        ("mixtral", "compressed-tensors", None, "or in groups of their own"),
        ("llama", "compressed-tensors", "vllm", ""),
    ],
)
def test_what_holds_one_group_size_refuses_two(
    model: str, form: str, reader: str | None, message: str, tiny_model: Callable[..., Path]
) -> None:
    family = load_model(str(tiny_model(model, layers=2, width=64))).family
    unit = next(unit.name for unit in family.units_of(0) if unit.routed or model == "llama")
    overrides: dict[str, Precision] = {f"layers.0.{unit}": FINE_GROUPS}
    found = find_refusal(family, format=form, grid=GRID, reader=reader, overrides=overrides)
    assert (found is None) == (not message)
    assert message in str(found or "")


def test_a_format_of_one_size_writes_no_second(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    loaded = load_model(str(tiny_model("llama", layers=2, width=64)))
    quantized = quantize_layers(loaded, (), method="rtn", grid=GRID, overrides={"layers.0.qkv": FINE_GROUPS})
    with pytest.raises(UnsupportedModelError, match="one group size"):
        export(quantized, tmp_path / "out", format="awq", texts=TEXTS)
    assert not (tmp_path / "out").exists()
