from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.clipping import exact as clip_exact
from quant_fairness_plugin.quantize.clipping.rules import squared_error
from quant_fairness_plugin.quantize.grid import fit_grid


def sample(rows: int, cols: int) -> Tensor:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols)) * torch.linspace(
        0.01, 1, rows
    ).unsqueeze(1)
    weight[0, 1] = 6.0  # an outlier
    weight[1] = weight[1].abs() + 0.2  # all on one side of 0
    weight[2] = 0.0
    return weight


def best_stored_error(values: Tensor, bits: int, zero: int, least: float, most: float, dtype: torch.dtype) -> float:
    """The least squared error over every single number of `dtype` between two scales."""
    ends = torch.tensor([least, most]).to(dtype).view(torch.int16)
    scales = torch.arange(int(ends[0]), int(ends[1]) + 1, dtype=torch.int16).view(dtype).double()
    scales = scales[(scales >= least) & (scales <= most)].unsqueeze(1)
    levels = (torch.round(values.double() / scales) + zero).clamp(0, 2**bits - 1) - zero
    return float(((values.double() - levels * scales) ** 2).sum(1).min())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (4, 32), (8, 32)])
def test_no_stored_scale_is_better(bits: int, group_size: int, dtype: torch.dtype, *, symmetric: bool) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric, clip="empirical")
    weight, steps = sample(5, 96), 2**bits - 1
    scales, zeros = fit_grid(weight, grid, scale_dtype=dtype)
    full, middles = fit_grid(weight, replace(grid, clip="absmax"), scale_dtype=dtype)
    grouped = weight.view(5, scales.shape[1], -1)
    errors = squared_error(grouped.double(), scales, zeros, bits)
    for row in (0, 1, 3, 4):
        for group in range(scales.shape[1]):
            values, middle, start = grouped[row, group], int(middles[row, group]), float(full[row, group])
            above, below = float(values.max().clamp(min=0)), float(-values.min().clamp(max=0))
            candidates = []
            for zero in {middle} if symmetric else {max(middle - 1, 0), middle, min(middle + 1, steps)}:
                most = max(above / max(steps - zero, 1), below / max(zero, 1), start)
                candidates.append(best_stored_error(values, bits, zero, 0.01 * start, most, dtype))
            assert float(errors[row, group]) == pytest.approx(min(candidates), rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_it_beats_the_search_in_percents_and_the_full_range(bits: int, *, symmetric: bool) -> None:
    weight = sample(17, 128)
    grid = Grid(bits=bits, group_size=32, symmetric=symmetric)
    errors = {}
    for clip in ("empirical", "mse", "absmax"):
        fit = fit_grid(weight, replace(grid, clip=clip), scale_dtype=torch.float16)
        errors[clip] = squared_error(weight.view(17, 4, 32).double(), *fit, bits)
    # The search in percents compares float32 sums.
    assert (errors["empirical"] <= errors["mse"] * (1 + 1e-6)).all()
    assert (errors["empirical"] <= errors["absmax"]).all()
    assert errors["empirical"].sum() < errors["mse"].sum() < errors["absmax"].sum()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = sample(17, 96), Grid(bits=3, group_size=32, clip="empirical")
    whole = fit_grid(weight, grid, scale_dtype=torch.bfloat16)
    monkeypatch.setattr(clip_exact, "CHUNK_VALUES", 100)
    parts = fit_grid(weight, grid, scale_dtype=torch.bfloat16)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-30, -1e-38, 3e4])
def test_vanishing_and_huge_groups_keep_a_finite_scale(value: float) -> None:
    weight = torch.full((2, 32), value)
    for symmetric in (True, False):
        grid = Grid(group_size=32, symmetric=symmetric, clip="empirical")
        scales, _ = fit_grid(weight, grid, scale_dtype=torch.float16)
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
