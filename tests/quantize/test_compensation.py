"""The target of a module whose inputs have lost something: by another way to solve for it, and in a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsolvableError
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.blocks import first_inputs
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.compensation import compensated
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.moments import LanguageMoment, Original, fair_moments, language_moments
from tests.planning import quantize_layers

Load = Callable[..., LoadedModel]


def sample(tokens: int = 41) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs as the 16-bit model has them, and as the quantized one has them, in float64."""
    draw = torch.Generator().manual_seed(3)
    weight, right = (torch.randn(size, 13, generator=draw, dtype=torch.float64) for size in (5, tokens))
    return weight, right, right + 0.1 * torch.randn(tokens, 13, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("damp", [1e-6, 0.2, 5.0])
@pytest.mark.parametrize("tokens", [41, 7])
def test_the_target_is_the_ridge_regression_of_the_right_outputs(tokens: int, damp: float) -> None:
    weight, right, given = sample(tokens)
    found = compensated(weight, given.T @ given, (right - given).T @ given, damp=damp)
    ridge = math.sqrt(damp * given.square().sum() / 13)
    stacked = torch.cat([given, ridge * torch.eye(13, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([right @ weight.T, ridge * weight.T])).solution.T
    # Seven tokens of thirteen channels leave the damping to decide: a condition number of 1e6 costs its digits.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_its_outputs_are_nearer_to_the_right_ones() -> None:
    weight, right, given = sample()
    found = compensated(weight, given.T @ given, (right - given).T @ given, damp=0.01)
    before, after = ((right @ weight.T - given @ other.T).square().sum() for other in (weight, found))
    assert after < 0.9 * before


def test_right_inputs_leave_the_weight_as_it_is() -> None:
    weight, _, given = sample()
    assert compensated(weight, given.T @ given, torch.zeros(13, 13, dtype=torch.float64), damp=0.2) is weight


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["hessian", "across"])
def test_inputs_that_are_not_finite_cannot_be_solved(value: float, place: str) -> None:
    weight, right, given = sample()
    moments = {"hessian": given.T @ given, "across": (right - given).T @ given}
    moments[place][2, 2] = value
    with pytest.raises(UnsolvableError, match="NaN or infinity on the calibration text"):
        compensated(weight, moments["hessian"], moments["across"], damp=0.2)


def test_differences_of_inputs_are_weighed_as_the_moments_are() -> None:
    draw = torch.Generator().manual_seed(5)
    given = {name: torch.randn(30, 17, generator=draw, dtype=torch.float64) for name in ("en", "he")}
    right = {name: value + torch.randn(30, 17, generator=draw, dtype=torch.float64) for name, value in given.items()}
    weight = torch.randn(9, 17, generator=draw)
    moments = [
        LanguageMoment(name, x.T @ x / 30, x.abs().mean(0), (right[name] - x).T @ x / 30) for name, x in given.items()
    ]
    found = fair_moments(moments, {"q": weight}, {"en": 0.75, "he": 0.25})
    expected = torch.zeros(17, 17, dtype=torch.float64)
    for name, share in (("en", 0.75), ("he", 0.25)):
        outputs = given[name] @ weight.double().T
        expected += share * (right[name] - given[name]).T @ given[name] / outputs.square().sum()
    torch.testing.assert_close(found.across["q"], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inputs_are_compared_row_by_row_with_those_of_the_untouched_block(
    load: Load, rows: CalibrationSet, family: str
) -> None:
    loaded = load(family)
    block, name = loaded.block(0), loaded.family.units[-1].modules[0]
    untouched, module = deepcopy(block), block.get_submodule(name)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.1)
    batches = first_inputs(loaded, rows, batch_tokens=50)
    found = {
        language.language: language
        for language in language_moments(block, module, 0, batches, rows, Original(untouched, batches))
    }
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {language: [] for language in rows.rows}
    for batch in batches:
        pair = []
        for here in (untouched, block):
            inputs: list[Tensor] = []
            target = here.get_submodule(name)
            handle = target.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0].flatten(0, -2)))
            with torch.no_grad():
                batch.run(here, 0)
            handle.remove()
            pair.append(inputs[0].double())
        seen[batch.language].append((pair[0], pair[1]))
    for language, pairs in seen.items():
        right, given = (torch.cat(side) for side in zip(*pairs, strict=True))
        across = found[language].across
        assert across is not None
        torch.testing.assert_close(across, (right - given).T @ given / len(given), rtol=1e-4, atol=1e-6)
        assert across.abs().max() > 1e-3  # the blocks do differ


def test_a_model_comes_nearer_to_its_outputs_than_without(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama", layers=4)
    tokens = torch.tensor([row for found in rows.rows.values() for row in found if len(row) == rows.row_tokens])
    with torch.no_grad():
        right = loaded.model(tokens).logits

    def error(compensates: bool) -> float:
        grid = Grid(bits=3, group_size=32)
        method = Gptq(compensates=compensates)
        quantized = quantize_layers(loaded, (), method=method, grid=grid, calibration=rows)
        with swapped(loaded, quantized.dense_weights()), torch.no_grad():
            return float((loaded.model(tokens).logits - right).square().sum())

    # Every matrix makes up for all in front of it; without, their errors add up.
    assert error(True) < 0.9 * error(False)
