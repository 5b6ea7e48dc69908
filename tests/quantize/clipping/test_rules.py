from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from quant_fairness_plugin.artifacts import Clip, Grid
from quant_fairness_plugin.quantize.clipping.rules import channel_kurtosis, squared_error
from quant_fairness_plugin.quantize.clipping.theory import Shape, dof_of_kurtosis, optimal_alpha
from quant_fairness_plugin.quantize.grid import fit_grid

ANALYTIC: tuple[Clip, ...] = ("gaussian", "laplace", "student-t")


def draw(rows: int, cols: int, *, dof: float = math.inf, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=generator)
    if math.isinf(dof):
        return normal
    squares = torch.randn(rows, cols, int(dof), generator=generator).square().mean(2)
    return normal / squares.sqrt()


def naive_range(values: Tensor, clip: Clip, bits: int, kurtosis: float, *, symmetric: bool) -> tuple[float, float]:
    """Of one group: the threshold by the library's theory, around its centre, cut at its own values."""
    numbers = values.double().tolist()
    centre = 0.0 if symmetric else sum(numbers) / len(numbers)
    away = [abs(x - centre) for x in numbers]
    spread = sum(away) / len(away) if clip == "laplace" else math.sqrt(sum(x * x for x in away) / len(away))
    dof = dof_of_kurtosis(kurtosis) if clip == "student-t" else math.inf
    shape: Shape = "laplace" if clip == "laplace" else "gaussian" if math.isinf(dof) else "student-t"
    alpha = spread * optimal_alpha(bits, shape, symmetric=symmetric, dof=dof if shape == "student-t" else None)
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    if symmetric:
        high = max(high, -low)
        low = -high
    return min(0.0, max(low, centre - alpha)), max(0.0, min(high, centre + alpha))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ANALYTIC)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, -1), (6, 128)])
def test_the_range_is_that_of_the_theory(clip: Clip, bits: int, group_size: int, *, symmetric: bool) -> None:
    weight = draw(5, 128, dof=5) + (0.0 if symmetric else 0.3)
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, clip=clip)
    scales, zeros = fit_grid(weight, grid, scale_dtype=torch.float32)
    grouped = weight.view(5, scales.shape[1], -1)
    for row in range(5):
        groups = [stats.kurtosis(grouped[row, group].double(), bias=False) for group in range(scales.shape[1])]
        kurtosis = float(sum(groups) / len(groups))
        for group in range(scales.shape[1]):
            low, high = naive_range(grouped[row, group], clip, bits, kurtosis, symmetric=symmetric)
            step = (high - low) / (2**bits - 1)
            assert float(scales[row, group]) == pytest.approx(step, rel=1e-3)  # the table of tails is that fine
            zero = 2 ** (bits - 1) if symmetric else min(2**bits - 1, max(0, round(-low / step)))
            assert abs(int(zeros[row, group]) - zero) <= (0 if symmetric else 1)


@pytest.mark.parametrize(("clip", "dof"), [("gaussian", math.inf), ("student-t", 5.0)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_on_its_own_distribution_a_rule_comes_close_to_the_best_of_all_scales(
    clip: Clip, dof: float, bits: int
) -> None:
    weight = draw(16, 2048, dof=dof)
    error = {}
    for rule in (clip, "empirical", "absmax"):
        fit = fit_grid(weight, Grid(bits=bits, group_size=-1, clip=rule), scale_dtype=torch.float16)
        error[rule] = float(squared_error(weight.view(16, 1, -1), *fit, bits).sum())
    assert error["empirical"] <= error[clip] < 0.8 * error["absmax"]
    assert error[clip] < 1.1 * error["empirical"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [*ANALYTIC, "mse", "empirical"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_rule_fits_every_grid(clip: Clip, group_size: int, *, symmetric: bool) -> None:
    weight = draw(3, 128)
    weight[1] = 0.25  # no spread: kurtosis and sigma are undefined or 0
    weight[2] = 0.0
    for bits in (2, 5, 8):
        grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, clip=clip)
        scales, zeros = fit_grid(weight, grid, scale_dtype=torch.bfloat16)
        full, _ = fit_grid(weight, replace(grid, clip="absmax"), scale_dtype=torch.bfloat16)
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
        assert zeros.dtype == torch.uint8
        if clip != "empirical":  # which may also reach as far as the largest value itself
            assert (scales <= full).all()


def test_kurtosis_is_the_mean_of_the_groups_sample_kurtosis() -> None:
    weight = draw(3, 192, dof=5).view(3, 3, 64)
    expected = stats.kurtosis(weight.double().numpy(), axis=2, bias=False).mean(1)
    torch.testing.assert_close(channel_kurtosis(weight).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


def test_groups_without_a_kurtosis_are_left_out_of_the_mean() -> None:
    weight = draw(2, 128).view(2, 2, 64)
    weight[0, 1] = 0.7
    weight[1] = 0.0
    expected = stats.kurtosis(weight[0, 0].double().numpy(), bias=False)
    assert float(channel_kurtosis(weight)[0]) == pytest.approx(float(expected), rel=1e-4)
    assert float(channel_kurtosis(weight)[1]) == 0.0
    assert channel_kurtosis(torch.randn(2, 1, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_kurtosis_does_not_depend_on_the_size_of_the_weights(size: float) -> None:
    weight = draw(2, 64).view(2, 1, 64)
    torch.testing.assert_close(channel_kurtosis(weight * size), channel_kurtosis(weight), rtol=1e-4, atol=1e-4)
