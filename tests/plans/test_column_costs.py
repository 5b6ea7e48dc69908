"""What 16-bit input channels cost a plan is what they take on disk, and layers get what is left of the budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.plans.costs import count_bytes, layers_budget, with_columns
from quant_fairness_plugin.recommend import explicit_plan

GRID = Grid(group_size=32)


def test_the_cost_is_what_the_file_takes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE, write_columns
    from tests.export.build import quantize_with_columns

    loaded = load_model(str(tiny_model("llama")))
    sizes, other = count_bytes(loaded, GRID)
    overrides = {"layers.0": "int8", "layers.1.down": "fp16"}
    plan = explicit_plan((), model="m", grid=GRID, layer_bytes=sizes, other_bytes=other, overrides=overrides)  # type: ignore[arg-type]
    found = with_columns(plan, loaded, 0.1)
    quantized = quantize_with_columns(tiny_model("llama"), protected=(), overrides=overrides)  # type: ignore[arg-type]
    write_columns(quantized.columns, tmp_path)
    header = read_header(tmp_path / COLUMNS_FILE)
    width = {"I32": 4, "F16": 2}
    assert found.extra_bytes - plan.extra_bytes == sum(
        width[dtype] * shape[0] * (shape[1] if len(shape) > 1 else 1) for dtype, shape in header.values()
    )
    assert found.overhead > plan.overhead
    assert found.protect_columns == 0.1
    assert found.reasons[-1].startswith("10% of the input channels of each quantized module: ")
    assert with_columns(plan, loaded, 0.0) is plan


def test_layers_get_what_is_left_of_the_budget(tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model("llama")))
    assert layers_budget(loaded, GRID, 0.0, 0.2) == 0.2
    left = layers_budget(loaded, GRID, 0.1, 0.5)
    sizes, other = count_bytes(loaded, GRID)
    plan = explicit_plan((), model="m", grid=GRID, layer_bytes=sizes, other_bytes=other)
    # An overhead is recorded with six digits.
    assert left == pytest.approx(0.5 - with_columns(plan, loaded, 0.1).overhead, abs=1e-6)
    with pytest.raises(ConfigError, match=r"protect_columns 0.5 alone costs .* more than max_overhead 5.0%"):
        layers_budget(loaded, GRID, 0.5, 0.05)
