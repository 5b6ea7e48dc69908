"""A model that is quantized with turned heads: what is gained, what is left alone, and what a bank makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.quantize import solve_blocks
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.moments import LanguageMoment
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.workplace import Workplace
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.checkpoint_bank import open_bank
from quant_fairness_plugin.sweep.model_bank import ModelBank
from tests.export.build import TEXTS
from tests.planning import quantize_layers

Load = Callable[..., LoadedModel]
GRID = Grid(group_size=32)
TURNED = Gptq(turned=True)
VALUES, OUTPUT = "self_attn.v_proj", "self_attn.o_proj"
LOUD = 40.0
"""How much larger one channel of each head is that has a scale in common with others."""


def name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module}"


def with_loud_channels(loaded: LoadedModel) -> LoadedModel:
    """Let one channel of every head read weights that are much larger than those of the others of its group."""
    with torch.no_grad():
        for layer in range(loaded.layers):
            modules = loaded.linears(layer)
            linear_weight(modules[name(layer, OUTPUT)])[:, 3::8] *= LOUD
            linear_weight(modules[name(layer, VALUES)])[3::8] /= LOUD
    return loaded


def divergence(loaded: LoadedModel, quantized: QuantizedModel) -> float:
    """Mean KL in nats of the quantized model from the original, on tokens that nothing was calibrated on."""
    ids = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        right = loaded.model(input_ids=ids).logits.log_softmax(-1)
        with swapped(loaded, quantized.dense_weights()) as model:
            found = model(input_ids=ids).logits.log_softmax(-1)
    return float((right.exp() * (right - found)).sum(-1).mean())


def test_what_loud_channels_cost_is_gained_back(load: Load, rows: CalibrationSet) -> None:
    loaded = with_loud_channels(load("llama"))
    plain, turned = (
        quantize_layers(loaded, (), method=Gptq(turned=turned), grid=GRID, calibration=rows) for turned in (False, True)
    )
    assert not plain.turned
    assert turned.turned == {name(layer, module) for layer in range(2) for module in (VALUES, OUTPUT)}
    assert plain.settings != turned.settings
    # Seven of eight weights of a group are rounded to 0 beside the loud one, and none where all are alike.
    for layer in range(2):
        assert turned.losses[name(layer, VALUES)] < 1.5 * plain.losses[name(layer, VALUES)]
        assert turned.losses[name(layer, OUTPUT)] < 0.7 * plain.losses[name(layer, OUTPUT)]
    assert divergence(loaded, turned) < divergence(loaded, plain)


def test_values_with_a_bias_are_turned_with_it(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen2")
    with torch.no_grad():
        for layer in range(loaded.layers):
            loaded.model.get_parameter(name(layer, f"{VALUES}.bias")).normal_(0.0, 2.0)
    found = quantize_layers(loaded, (), method=TURNED, grid=GRID, calibration=rows)
    assert set(found.folded) == {name(layer, f"{VALUES}.bias") for layer in range(2)}
    assert divergence(loaded, found) < 0.1
    without = replace(found, folded={})
    assert divergence(loaded, without) > 3 * divergence(loaded, found)


@pytest.mark.parametrize("case", ["columns", "protected", "unit", "usual", "floats"])
def test_where_nothing_is_turned(case: str, load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama")
    grid = Grid(bits=8, group_size=-1, scheme="fp8") if case == "floats" else GRID
    found = quantize_layers(
        loaded,
        [0] if case == "protected" else [],
        method=Gptq() if case == "usual" else TURNED,
        grid=grid,
        columns=0.1 if case == "columns" else 0.0,
        overrides={"layers.0.o": "fp16"} if case == "unit" else {},
        calibration=rows,
    )
    layers = {1} if case in ("protected", "unit") else set()
    assert found.turned == {name(layer, module) for layer in layers for module in (VALUES, OUTPUT)}
    assert not found.folded


def test_two_precisions_are_turned_as_one(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama")
    found = quantize_layers(loaded, (), method=TURNED, grid=GRID, overrides={"layers.0.o": "int8"}, calibration=rows)
    assert name(0, OUTPUT) in found.turned
    assert found.bits[name(0, OUTPUT)] == 8
    error = found.model_weight(name(0, OUTPUT)) - linear_weight(loaded.linears(0)[name(0, OUTPUT)])
    assert error.abs().max() < 0.02 * linear_weight(loaded.linears(0)[name(0, OUTPUT)]).abs().max()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let one module of the first layer be given what is not finite."""

    def plant(module: str) -> None:
        measured = solve_blocks.language_moments

        def poisoned(
            block: torch.nn.Module, inside: torch.nn.Module, layer: int, *rest: object
        ) -> Iterator[LanguageMoment]:
            hit = layer == 0 and inside is block.get_submodule(module)
            for found in measured(block, inside, layer, *rest):  # type: ignore[arg-type] # handed on
                yield replace(found, moment=found.moment * (math.nan if hit else 1.0))

        monkeypatch.setattr(solve_blocks, "language_moments", poisoned)

    return plant


@pytest.mark.parametrize("first", ["self_attn.q_proj", OUTPUT])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_cannot_be_solved_stays_turned_beside_what_is(
    family: str, first: str, load: Load, rows: CalibrationSet, poison: Callable[[str], None], tmp_path: Path
) -> None:
    """In 16 bit, because the other half of the turn is in integers."""
    loaded, place = load(family), Workplace(tmp_path / "work")
    poison(first)
    found = quantize_layers(loaded, (), method=TURNED, grid=GRID, calibration=rows, workplace=place)
    kept = OUTPUT if first == OUTPUT else VALUES
    assert name(0, kept) in found.kept
    assert name(0, f"{kept}.weight") in found.folded
    whole = quantize_layers(loaded, (), method="rtn", grid=GRID)
    assert divergence(loaded, found) < divergence(loaded, whole)
    again = quantize_layers(loaded, (), method=TURNED, grid=GRID, calibration=rows, workplace=place)
    assert again.turned == found.turned
    assert all(torch.equal(value, again.folded[key]) for key, value in found.folded.items())
    export(found, tmp_path / "out", texts=TEXTS)
    verify(tmp_path / "out")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad(), swapped(loaded, found.dense_weights()) as model:
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(
            load_dense_model(tmp_path / "out")(input_ids=ids).logits, expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_banks_hold_weights_as_they_stand_in_the_model(
    family: str, tiny_model: Callable[..., Path], rows: CalibrationSet, tmp_path: Path
) -> None:
    """A unit of a turned model is exchanged alone: what it was solved from is the original's, turned."""
    loaded = load_model(str(tiny_model(family)))
    found = quantize_layers(loaded, (), method=TURNED, grid=GRID, calibration=rows)
    units = map_units(loaded)
    bank = ModelBank(units, found, RtnBank(loaded, units, GRID))
    export(found, tmp_path / "out", texts=TEXTS)
    read = open_bank(loaded, units, folder=tmp_path / "out", grid=GRID)
    assert not read.folds
    for unit in units.group_names():
        weights = bank.weights(unit, "int4")
        for key, value in weights.items():
            original = loaded.model.get_parameter(key).detach()
            assert float((value - original).norm()) < 0.25 * float(original.norm())
            torch.testing.assert_close(read.weights(unit, "int4")[key], value, rtol=0, atol=1e-5)
    everything: dict[str, Tensor] = {}
    for unit in units.group_names():
        everything |= bank.weights(unit, "int4")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        with swapped(loaded, found.dense_weights()) as model:
            expected = model(input_ids=ids).logits
        with swapped(loaded, everything) as model:
            # But for the bias, which is not turned here and not rounded again.
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=5e-2, rtol=0)
