"""Scales and integers that are solved again, each for the others: by brute force, and that no step makes it worse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize import refinement
from quant_fairness_plugin.quantize.gptq import output_loss, refine_result, solve_gptq
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from quant_fairness_plugin.quantize.refinement import best_integers, best_scales, refine
from tests.quantize.test_gptq import sample

GRIDS = [
    (5, 64, Grid(group_size=32)),
    (17, 96, Grid(bits=3, group_size=32, symmetric=False)),
    (3, 63, Grid(group_size=-1)),
    (1, 17, Grid(bits=2, group_size=-1, clip="mse")),
    (7, 192, Grid(bits=8, group_size=64)),
]


def start(rows: int, cols: int, grid: Grid) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """A rounded weight, the weight, and a positive definite curvature in float64."""
    weight, hessian = sample(rows, cols)
    curvature = hessian.double()
    curvature.diagonal().add_(0.01 * curvature.diagonal().mean())
    return quantize_rtn(weight, grid, scale_dtype=torch.float16), weight.double(), curvature


def errors(tensor: QuantizedTensor, weight: Tensor, curvature: Tensor) -> list[float]:
    """The error of each row, entry by entry."""
    difference = tensor.dequantize().double() - weight
    return [float(row @ curvature @ row) for row in difference]


@pytest.mark.parametrize(("rows", "cols", "grid"), GRIDS)
def test_no_step_makes_any_row_worse(rows: int, cols: int, grid: Grid) -> None:
    tensor, weight, curvature = start(rows, cols, grid)
    wanted = weight @ curvature
    for step in (best_scales, best_integers, best_scales, best_integers):
        before = errors(tensor, weight, curvature)
        tensor = step(tensor, wanted, curvature)
        after = errors(tensor, weight, curvature)
        # float64 rounds a sum of squares at about 1e-16 of its largest term
        assert all(new <= old * (1 + 1e-9) for new, old in zip(after, before, strict=True)), step
        assert tensor.scales.dtype == torch.float16
        assert int(tensor.integers.max()) < 2**grid.bits


@pytest.mark.parametrize(("rows", "cols", "grid"), GRIDS)
def test_no_other_integer_in_one_place_would_be_better(
    rows: int, cols: int, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, weight, curvature = start(rows, cols, grid)
    monkeypatch.setattr(refinement, "SWEEPS", 200)  # until nothing moves
    monkeypatch.setattr(refinement, "BLOCK", 5)
    settled = best_integers(tensor, weight @ curvature, curvature)
    assert not torch.equal(settled.integers, tensor.integers)
    least = errors(settled, weight, curvature)
    for column in range(cols):
        for level in range(min(2**grid.bits, 16)):
            integers = settled.integers.clone()
            integers[:, column] = level
            other = errors(replace(settled, integers=integers), weight, curvature)
            assert all(new >= old * (1 - 1e-9) for new, old in zip(other, least, strict=True)), (column, level)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_change_nothing_but_the_speed(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, weight, curvature = start(*GRIDS[1])
    expected = best_integers(tensor, weight @ curvature, curvature).integers
    monkeypatch.setattr(refinement, "BLOCK", block)
    assert torch.equal(best_integers(tensor, weight @ curvature, curvature).integers, expected)


@pytest.mark.parametrize(("rows", "cols", "grid"), GRIDS[:3])
def test_scales_are_those_of_least_squares(rows: int, cols: int, grid: Grid) -> None:
    tensor, weight, curvature = start(rows, cols, grid)
    found = best_scales(tensor, weight @ curvature, curvature)
    root = torch.linalg.cholesky(curvature).T  # |root d|² is the error of a difference d
    groups = tensor.scales.shape[1]
    changed = 0
    for row in range(rows):
        levels = (tensor.integers[row].double() - tensor.zeros[row].double().repeat_interleave(cols // groups)).view(
            groups, -1
        )
        columns = torch.block_diag(*(group.unsqueeze(1) for group in levels))
        design = root @ columns
        hold = (refinement.RIDGE * design.square().sum(0).mean()).sqrt()
        stacked = torch.cat([design, hold * torch.eye(groups, dtype=torch.float64)])
        right = torch.cat([root @ weight[row], hold * tensor.scales[row].double()])
        expected = torch.linalg.lstsq(stacked, right.unsqueeze(1)).solution.squeeze(1)
        kept = torch.equal(found.scales[row], tensor.scales[row])
        changed += not kept
        if not kept:
            torch.testing.assert_close(found.scales[row], expected.half(), rtol=2**-10, atol=0)
    assert changed >= rows / 2
    assert torch.equal(found.integers, tensor.integers)


def test_rows_without_any_level_and_scales_that_cannot_be_stored_stay() -> None:
    tensor, weight, curvature = start(*GRIDS[0])
    weight[1] = 0
    weight[2] *= 1e6  # its best scale is beyond float16
    tensor.integers[1] = tensor.zeros[1, 0]
    found = refine(tensor, weight, curvature, damp=0.01, rounds=1)
    assert torch.equal(found.scales[1:3], tensor.scales[1:3])
    assert torch.equal(found.integers[1], tensor.integers[1])
    assert torch.isfinite(found.scales).all()


@pytest.mark.parametrize(("rows", "cols", "grid"), GRIDS[:2])
def test_gptq_ends_with_a_smaller_output_error(rows: int, cols: int, grid: Grid) -> None:
    weight, hessian = sample(rows, cols)
    once = solve_gptq(weight, hessian, grid, scale_dtype=torch.float16, damp=0.05)
    found = [refine_result(once, weight, hessian, damp=0.01, rounds=rounds) for rounds in (0, 1, 3)]
    none, one, three = (output_loss(weight, result.tensor.dequantize(), hessian) for result in found)
    assert three <= one < 0.95 * none
    assert [result.loss_relative_to_output_energy for result in found] == [none, one, three]
    assert {result.damp_used for result in found} == {once.damp_used}


@pytest.mark.parametrize("dead", [slice(0, 64), slice(3, 5)])
def test_columns_without_any_input_are_rounded_to_nearest(dead: slice) -> None:
    rows, cols, grid = GRIDS[0]
    weight, hessian = sample(rows, cols)
    hessian[dead], hessian[:, dead] = 0, 0
    once = solve_gptq(weight, hessian, grid, scale_dtype=torch.float16, damp=0.05)
    found = refine_result(once, weight, hessian, damp=0.05, rounds=2).tensor
    near = weight.view(rows, 2, 32) / found.scales.float().unsqueeze(2) + found.zeros.float().unsqueeze(2)
    nearest = near.round().clamp(0, 15).to(torch.uint8).view(rows, cols)
    assert torch.equal(found.integers[:, dead], nearest[:, dead])
