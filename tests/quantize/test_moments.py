from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.gptq import solve_gptq
from quant_fairness_plugin.quantize.grid import fit_grid
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.moments import (
    WIDEST_BLOCK,
    GroupMoments,
    LanguageMoment,
    MomentWatch,
    diagonal_blocks,
    output_energy,
)
from tests.planning import quantize_layers

GRID = Grid(bits=3, group_size=32, clip="minimax")


def moments(columns: int, languages: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(columns)
    inputs = [torch.randn(40, columns, generator=generator) * 10.0**i for i in range(languages)]
    mix = torch.randn(languages, columns, generator=generator).exp()
    return [(given * own).T @ (given * own) / 40 for given, own in zip(inputs, mix, strict=True)]


def watched(weight: Tensor, grid: Grid, given: list[Tensor]) -> GroupMoments:
    watch = MomentWatch({"m": weight}, {"m": grid})
    stream = (LanguageMoment(f"l{i}", moment, moment.diagonal()) for i, moment in enumerate(given))
    assert [found.language for found in watch.watch(stream)] == [f"l{i}" for i in range(len(given))]
    inputs = watch.inputs("m")
    assert inputs is not None
    return inputs


def naive_worst(error: Tensor, weight: Tensor, given: list[Tensor], size: int) -> Tensor:
    """Row by row and block by block."""
    rows, cols = weight.shape
    worst = torch.zeros(rows, -(-cols // size))
    for moment in given:
        energy = output_energy(weight, moment)
        for row in range(rows):
            for block, start in enumerate(range(0, cols, size)):
                part, own = error[row, start : start + size], moment[start : start + size, start : start + size]
                worst[row, block] = max(float(worst[row, block]), float(part @ own @ part) / energy)
    return worst


@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (128, 64)])
def test_the_worst_language_is_judged_against_its_own_energy(columns: int, group_size: int) -> None:
    weight, error = torch.randn(5, columns), torch.randn(5, columns) / 10
    given = moments(columns)
    inputs = watched(weight, replace(GRID, group_size=group_size), given)
    found = inputs.worst_error(error.view(5, -1, group_size))
    torch.testing.assert_close(found, naive_worst(error, weight, given, group_size), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("columns", [63, 200, 300])
def test_a_row_of_one_group_is_the_sum_of_its_blocks(columns: int) -> None:
    weight, error = torch.randn(3, columns), torch.randn(3, columns)
    [moment] = given = moments(columns, 1)
    found = watched(weight, replace(GRID, group_size=-1), given).worst_error(error.unsqueeze(1))
    size = min(columns, WIDEST_BLOCK)
    expected = naive_worst(error, weight, given, size).sum(1, keepdim=True)
    assert diagonal_blocks(moment, -1).shape == (-(-columns // size), size, size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_minimax_clip_takes_the_best_of_the_shrunk_ranges_around_it(group_size: int, *, symmetric: bool) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    weight[0, 1] = 9.0
    grid = replace(GRID, group_size=group_size, symmetric=symmetric)
    inputs = watched(weight, grid, moments(96))
    scales, zeros = fit_grid(weight, grid, scale_dtype=torch.float16, inputs=inputs)
    groups = scales.shape[1]
    grouped = weight.view(7, groups, -1)

    def worst(scales: Tensor, zeros: Tensor) -> Tensor:
        scale, zero = scales.float().unsqueeze(2), zeros.float().unsqueeze(2)
        levels = (torch.round(grouped / scale) + zero).clamp(0, 7) - zero
        return inputs.worst_error(levels * scale - grouped)

    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    tries = []
    for percent in range(80):
        keep = 1 - percent / 100
        step = ((high * keep - low * keep) / 7).half()
        zero = torch.full_like(low, 4.0) if symmetric else torch.round(-low * keep / step.float()).clamp(0, 7)
        tries.append(worst(step, zero))
    errors = torch.stack(tries)
    found = worst(scales, zeros)
    coarse = errors[::4]
    best = coarse.argmin(0) * 4
    around = torch.stack([errors.gather(0, (best + i).clamp(0, 79).unsqueeze(0))[0] for i in range(-3, 4)])
    torch.testing.assert_close(found, around.amin(0), rtol=1e-5, atol=1e-9)
    assert (found <= errors[0] * (1 + 1e-6)).all()
    assert (found < 0.9 * errors[0]).any()


def test_a_language_without_output_cannot_be_hurt() -> None:
    weight = torch.randn(4, 32)
    given = [torch.zeros(32, 32), *moments(32, 1)]
    inputs = watched(weight, GRID, given)
    error = torch.randn(4, 1, 32)
    assert torch.equal(inputs.worst_error(error), watched(weight, GRID, given[1:]).worst_error(error))


def test_nothing_is_kept_for_other_rules() -> None:
    weights = {"a": torch.randn(4, 32), "b": torch.randn(4, 32)}
    watch = MomentWatch(weights, dict.fromkeys(weights, Grid(group_size=32)))
    passing: Iterator[LanguageMoment] = watch.watch([LanguageMoment("en", torch.eye(32), torch.ones(32))])
    assert len(list(passing)) == 1
    assert watch.inputs("a") is None
    assert not watch._blocks


def test_minimax_without_inputs_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="clip 'minimax' needs what each language feeds.*method 'gptq'.*clip 'mse'"):
        fit_grid(torch.randn(4, 32), GRID, scale_dtype=torch.float16)


def test_moments_of_another_module_are_refused() -> None:
    inputs = watched(torch.randn(4, 96), GRID, moments(96))
    with pytest.raises(ConfigError, match="moments of 3 blocks of 32 channels do not fit a weight of 64 columns"):
        fit_grid(torch.randn(4, 64), GRID, scale_dtype=torch.float16, inputs=inputs)


def test_gptq_solves_on_the_grid_of_the_languages() -> None:
    weight = torch.randn(7, 64)
    given = moments(64)
    inputs = watched(weight, GRID, given)
    solved = solve_gptq(weight, given[0], GRID, scale_dtype=torch.float16, damp=0.05, inputs=inputs)
    assert torch.equal(solved.tensor.scales, fit_grid(weight, GRID, scale_dtype=torch.float16, inputs=inputs)[0])
    with pytest.raises(ConfigError, match="clip 'minimax' needs"):
        solve_gptq(weight, given[0], GRID, scale_dtype=torch.float16, damp=0.05)


def test_a_whole_model_is_clipped_by_language(load: Callable[..., LoadedModel], rows: CalibrationSet) -> None:
    loaded = load("llama")
    once = Gptq(refinements=0)
    plain = quantize_layers(loaded, (), method=once, grid=replace(GRID, clip="absmax"), calibration=rows)
    clipped = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    first = next(iter(plain.tensors))
    assert clipped.tensors.keys() == plain.tensors.keys()
    assert (clipped.tensors[first].scales <= plain.tensors[first].scales).all()
    assert (clipped.tensors[first].scales < plain.tensors[first].scales).any()
    # Least squares would choose for all languages together.
    chosen = quantize_layers(loaded, (), method=once, grid=GRID, calibration=rows)
    assert torch.equal(clipped.tensors[first].scales, chosen.tensors[first].scales)
    assert not torch.equal(clipped.tensors[first].integers, chosen.tensors[first].integers)
