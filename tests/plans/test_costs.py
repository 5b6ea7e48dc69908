"""What a plan is said to cost is what the tensors of its checkpoint weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.contents import checkpoint_tensors
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.costs import count_bytes, has_bytes, layers_and_overrides, plan_bytes
from tests.planning import quantize_layers

PLANS: list[tuple[tuple[int, ...], Mapping[str, Precision]]] = [
    ((), {}),
    ((1,), {}),
    ((), {"layers.2": "int8"}),
    ((1,), {"layers.0.down": "fp16", "layers.2.qkv": "int8"}),
    ((1,), {"layers.0.down": "int4g32", "layers.2.qkv": "int8", "layers.2.o": "int4g32"}),
    ((0,), {"layers.2": "int8", "layers.2.down": "int4", "layers.2.gate_up": "fp16"}),
]


@pytest.mark.parametrize(("protected", "overrides"), PLANS)
@pytest.mark.parametrize(
    ("grid", "width"),
    [(Grid(group_size=32), 32), (Grid(group_size=32, symmetric=False), 32), (Grid(), 96), (Grid(), 48)],
)
def test_a_plan_costs_what_its_tensors_weigh(
    tiny_model: Callable[..., Path],
    protected: tuple[int, ...],
    overrides: Mapping[str, Precision],
    grid: Grid,
    width: int,
) -> None:
    """Of width 96 `down` has groups of 64, the others of 32; of 48 only `down` has groups. Shapes are not counted."""
    loaded = load_model(str(tiny_model("llama", layers=3, width=width)))
    quantized = quantize_layers(loaded, protected, method="rtn", grid=grid, overrides=overrides)
    tensors = checkpoint_tensors(quantized, checkpoint_format("compressed-tensors"))
    stored = sum(tensor.nbytes for name, tensor in tensors if not name.endswith(".weight_shape"))
    layer_bytes, other = count_bytes(loaded, grid, tuple(overrides.values()))
    assert plan_bytes(layer_bytes, other, protected, overrides) == stored


def test_a_table_without_units_cannot_price_them() -> None:
    old = {"fp16": (1000, 1000), "quantized": (260, 260)}
    assert plan_bytes(old, 40, (0,)) == 1300
    with pytest.raises(ConfigError, match=r"'fp16\.down' in layer 1 are not known; known are fp16, quantized"):
        plan_bytes(old, 40, (), {"layers.1.down": "fp16"})


def test_every_swept_precision_has_its_price(tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model("llama", layers=3)))
    grid, overrides = Grid(group_size=32, bits=3), {"layers.0": "int6", "layers.1.down": "int5", "layers.2": "int3"}
    layer_bytes, other = count_bytes(loaded, grid, ("fp16", "int6", "int5"))
    floor, weights = plan_bytes(layer_bytes, other, (), quantized="int3"), layer_bytes["fp16"][0] // 2
    down = layer_bytes["fp16.down"][0] // 2
    extra = plan_bytes(layer_bytes, other, (), overrides, quantized="int3") - floor
    assert extra == 3 * weights // 8 + 2 * down // 8
    with pytest.raises(ConfigError, match=r"'int2' in layer 0 are not known.*sweep again with --precisions"):
        plan_bytes(layer_bytes, other, (), {"layers.0": "int2"}, quantized="int3")


def test_a_plan_is_split_into_whole_layers_and_what_is_elsewhere() -> None:
    choice: dict[str, Precision] = {
        "layers.2": "fp16",
        "layers.2.down": "int8",
        "layers.0.o": "fp16",
        "layers.1": "int8",
    }
    assert layers_and_overrides(choice) == ((2,), {"layers.0.o": "fp16", "layers.1": "int8"})


@pytest.mark.parametrize(
    ("unit", "known"),
    [("layers.1", True), ("layers.1.down", True), ("layers.1.norms", False), ("embeddings", False), ("head", False)],
)
def test_only_layers_and_fusion_groups_have_bytes(unit: str, known: bool) -> None:
    assert has_bytes({"fp16": (1,), "fp16.down": (1,)}, unit) is known
