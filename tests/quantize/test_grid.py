from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.quantize.grid import fit_grid, quantize_rtn, to_integers

SHAPES = [(1, 32), (17, 64), (33, 96), (3, 128)]


def naive(weight: Tensor, grid: Grid, keep: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group by group and value by value: integers, scales, zeros and squared errors for a range shrunk by `keep`."""
    rows, cols = weight.shape
    width = cols if grid.group_size == -1 else grid.group_size
    steps = 2**grid.bits - 1
    integers, scales = torch.zeros(rows, cols), torch.zeros(rows, cols // width, dtype=dtype)
    zeros, errors = torch.zeros(rows, cols // width), torch.zeros(rows, cols // width)
    for row in range(rows):
        for group in range(cols // width):
            values = weight[row, group * width : (group + 1) * width]
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            if grid.symmetric:
                high = max(high, -low)
                low = -high
            low, high = float(torch.tensor(low) * keep), float(torch.tensor(high) * keep)
            scale = ((torch.tensor(high) - torch.tensor(low)) / steps).to(dtype)
            zero = 2.0 ** (grid.bits - 1) if grid.symmetric else round(float(torch.tensor(-low) / scale.float()))
            zero = min(steps, max(0, zero))
            scales[row, group], zeros[row, group] = scale, zero
            for i, value in enumerate(values):
                level = min(steps, max(0, round(float(value / scale.float())) + zero))
                integers[row, group * width + i] = level
                errors[row, group] += (float(value) - (level - zero) * float(scale)) ** 2
    return integers, scales, zeros, errors


def sample(rows: int, cols: int) -> Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    weight[0, 1] = 6.0  # an outlier, which clipping has something to gain from
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, -1), (2, 32), (8, 32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_equals_the_naive_one(shape: tuple[int, int], bits: int, group_size: int, *, symmetric: bool) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = sample(*shape)
    integers, scales, zeros, _ = naive(weight, grid, 1.0, torch.float16)
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.float16)
    assert torch.equal(tensor.scales, scales)
    assert torch.equal(tensor.zeros, zeros.to(torch.uint8))
    assert torch.equal(tensor.integers, integers.to(torch.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_clipping_takes_the_best_of_all_shrunk_ranges(*, symmetric: bool) -> None:
    grid = Grid(bits=3, group_size=32, symmetric=symmetric, clip="mse")
    weight = sample(5, 64)
    tries = torch.stack([naive(weight, grid, 1 - step / 100, torch.float16)[3] for step in range(80)])
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.float16)
    errors = (tensor.dequantize() - weight).view(5, 2, 32).square().sum(2)
    # float32 sums of 32 squares differ in the last bits between the two
    torch.testing.assert_close(errors, tries.amin(0), rtol=1e-5, atol=1e-6)
    assert (errors < tries[0]).any()


def test_symmetric_convention_is_that_of_the_gptq_toolchains() -> None:
    weight = torch.tensor([[-7.5, 7.5, 1.0, *[0.0] * 29]])
    tensor = quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.float16)
    assert tensor.scales.item() == 1.0  # 2 * 7.5 / 15
    assert tensor.zeros.item() == 8
    assert tensor.integers[0, :4].tolist() == [0, 15, 9, 8]  # 7.5 rounds to 8, and 16 is clamped


def test_integers_are_chosen_against_the_stored_scale() -> None:
    weight = torch.tensor([[1.0, -1.0, *[0.979] * 30]])
    grid = Grid(bits=8, group_size=32)
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.bfloat16)
    exact = 2 / 255
    assert tensor.scales.item() != exact  # bfloat16 keeps eight bits of it
    assert tensor.integers[0, 2].item() == round(0.979 / tensor.scales.item()) + 128
    assert tensor.integers[0, 2].item() != round(0.979 / exact) + 128


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_is_exact_in_float32(dtype: torch.dtype) -> None:
    tensor = quantize_rtn(sample(17, 64), Grid(group_size=32, symmetric=False), scale_dtype=dtype)
    values = tensor.dequantize()
    assert values.dtype == torch.float32
    for row, col in [(0, 0), (16, 63), (5, 31), (5, 32)]:
        step = float(tensor.scales[row, col // 32])
        expected = (int(tensor.integers[row, col]) - int(tensor.zeros[row, col // 32])) * step
        assert values[row, col].item() == pytest.approx(expected, rel=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.floats(1e-6, 1e4))
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, size: float) -> None:
    weight = size * torch.randn(3, 32, generator=torch.Generator().manual_seed(bits))
    tensor = quantize_rtn(weight, Grid(bits=bits, group_size=32, symmetric=symmetric), scale_dtype=torch.float32)
    # An asymmetric zero point is rounded, which moves the whole range by up to half a step more.
    bound = tensor.scales * (0.501 if symmetric else 1.001)
    assert ((tensor.dequantize() - weight).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-9, 1e-30])
def test_zero_and_vanishing_groups_stay_zero(value: float, dtype: torch.dtype, *, symmetric: bool) -> None:
    weight = torch.zeros(2, 64)
    weight[0, :32] = value
    weight[1] = 0.5
    grid = Grid(group_size=32, symmetric=symmetric)
    tensor = quantize_rtn(weight, grid, scale_dtype=dtype)
    assert (tensor.scales > 0).all()
    assert tensor.dequantize()[0].abs().max() <= max(abs(value) * 1.1, 0)
    assert tensor.dequantize()[1].max() > 0.4


def test_zero_is_always_on_the_grid() -> None:
    weight = sample(3, 32).abs() + 1.0  # all positive: an asymmetric range would otherwise start at 1
    weight[:, 7] = 0.0
    tensor = quantize_rtn(weight, Grid(group_size=32, symmetric=False), scale_dtype=torch.float16)
    assert (tensor.dequantize()[:, 7] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = sample(3, 32)
    weight[1, 5] = value
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.float16)


def test_weights_beyond_the_scale_dtype_are_refused() -> None:
    weight = torch.full((8, 32), 1e6)
    with pytest.raises(UnsupportedModelError, match=r"magnitude 1e\+06 is too large for torch\.float16.*bfloat16"):
        quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.float16)
    assert torch.isfinite(quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.bfloat16).dequantize()).all()


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 32 does not divide 33"):
        fit_grid(torch.randn(2, 33), Grid(group_size=32), scale_dtype=torch.float16)


def test_a_bad_grid_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match="bits 16 is not an integer from 2 to 8"):
        quantize_rtn(torch.randn(2, 32), Grid(bits=16, group_size=32), scale_dtype=torch.float16)


def test_ties_go_to_even() -> None:
    scales, zeros = torch.ones(1, dtype=torch.float16), torch.zeros(1, dtype=torch.uint8)
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, 15.5, 99.0])
    assert to_integers(values, scales, zeros, bits=4).tolist() == [0, 2, 2, 0, 15, 15]


def test_the_weight_itself_and_views_of_it_are_not_changed() -> None:
    stored = sample(64, 33)
    before = stored.clone()
    view = stored.t()  # what a Conv1D gives: not contiguous
    tensor = quantize_rtn(view, Grid(group_size=32, clip="mse"), scale_dtype=torch.float16)
    same = quantize_rtn(view.contiguous(), Grid(group_size=32, clip="mse"), scale_dtype=torch.float16)
    assert torch.equal(stored, before)
    assert torch.equal(tensor.integers, same.integers)
