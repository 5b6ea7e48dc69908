"""The matrix and the plan-time rules agree on every cell. Needs no reader; whether the refusals are true does."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.checkpoint.readers import find_refusal
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.model.families import Family, detect_family
from tests.readers.checkpoints import options
from tests.readers.matrix import Cell, all_cells, family_of
from tests.tiny import tiny_config


@cache
def family(name: str) -> Family:
    with torch.device("meta"):
        return detect_family(AutoModelForCausalLM.from_config(tiny_config(name, layers=2, width=32)))


@pytest.mark.parametrize("cell", all_cells(), ids=lambda cell: cell.name)
def test_what_is_refused_at_plan_time_is_what_the_matrix_says(cell: Cell) -> None:
    config = make_config(**options(cell.checkpoint, cell.reader))
    said = find_refusal(
        family(family_of(cell.checkpoint.model)),
        format=config.format,
        grid=config.grid,
        reader=cell.reader,
        overrides={f"layers.{layer}": "int8" for layer in config.int8_layers},
    )
    if cell.refusal is None:
        assert said is None
    else:
        assert cell.refusal in str(said)
