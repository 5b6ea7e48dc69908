from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.quantize import gptq
from quant_fairness_plugin.quantize.gptq import output_loss
from quant_fairness_plugin.quantize.grid import fit_grid, quantize_rtn, to_integers

solve_gptq = partial(gptq.solve_gptq, damp=0.05)


def sample(rows: int, cols: int, *, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of strongly correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(0, 1.5, cols).flip(0)
    inputs = torch.randn(tokens, cols // 4 + 1, generator=generator) @ mix[: cols // 4 + 1]
    inputs += 0.3 * torch.randn(tokens, cols, generator=generator)
    return weight, inputs.T @ inputs


def naive(weight: Tensor, hessian: Tensor, grid: Grid, *, damp: float, act_order: bool) -> Tensor:
    """Optimal Brain Quantization in a fixed order: the inverse itself, one column at a time, in float64."""
    scales, zeros = fit_grid(weight, grid, scale_dtype=torch.float16)
    cols = weight.shape[1]
    width = cols // scales.shape[1]
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    order = sorted(range(cols), key=lambda j: -float(diagonal[j])) if act_order else list(range(cols))
    inverse = torch.linalg.inv(hessian + damp * diagonal.mean() * torch.eye(cols, dtype=torch.float64))
    work = weight.double().clone()
    integers = torch.zeros(weight.shape, dtype=torch.uint8)
    left = list(order)
    while left:
        j = left.pop(0)
        scale, zero = scales[:, j // width], zeros[:, j // width]
        integers[:, j] = to_integers(work[:, j], scale, zero, bits=grid.bits)
        value = (integers[:, j].double() - zero.double()) * scale.double()
        error = (work[:, j] - value) / inverse[j, j]
        for k in left:
            work[:, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return integers


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "grid"),
    [
        (5, 64, Grid(group_size=32)),
        (17, 96, Grid(bits=3, group_size=32, symmetric=False)),
        (3, 63, Grid(group_size=-1)),
        (1, 17, Grid(bits=2, group_size=-1, clip="mse")),
    ],
)
@pytest.mark.parametrize("block", [1, 17, 128])
def test_integers_equal_those_of_column_by_column_obq(
    rows: int, cols: int, grid: Grid, block: int, *, act_order: bool
) -> None:
    weight, hessian = sample(rows, cols)
    expected = naive(weight, hessian, grid, damp=0.05, act_order=act_order)
    solved = solve_gptq(weight, hessian, grid, scale_dtype=torch.float16, block=block, act_order=act_order)
    assert torch.equal(solved.tensor.integers, expected)
    assert not torch.equal(expected, quantize_rtn(weight, grid, scale_dtype=torch.float16).integers)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_that_of_rounding(bits: int) -> None:
    weight, hessian = sample(33, 128)
    grid = Grid(bits=bits, group_size=64)
    solved = solve_gptq(weight, hessian, grid, scale_dtype=torch.float16)
    rounded = quantize_rtn(weight, grid, scale_dtype=torch.float16).dequantize()
    assert solved.loss_relative_to_output_energy < 0.5 * output_loss(weight, rounded, hessian)


def test_act_order_lowers_the_error_where_columns_differ() -> None:
    weight, hessian = sample(33, 128)
    hessian = hessian.flip(0, 1)  # the largest columns come last, where left to right can no longer make up for them
    grid = Grid(bits=3, group_size=32)
    losses = [
        solve_gptq(weight, hessian, grid, scale_dtype=torch.float16, act_order=act_order).loss_relative_to_output_energy
        for act_order in (True, False)
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_uncorrelated_inputs_give_plain_rounding(size: float, *, act_order: bool) -> None:
    weight, _ = sample(17, 64)
    grid = Grid(group_size=32, symmetric=False)
    solved = solve_gptq(weight, size * torch.eye(64), grid, scale_dtype=torch.float16, act_order=act_order)
    assert torch.equal(solved.tensor.integers, quantize_rtn(weight, grid, scale_dtype=torch.float16).integers)


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = sample(5, 64)
    first = solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16)
    second = solve_gptq(weight, hessian * 1024, Grid(group_size=32), scale_dtype=torch.float16)
    assert torch.equal(first.tensor.integers, second.tensor.integers)


def test_act_order_leaves_grid_and_layout_as_they_are() -> None:
    weight, hessian = sample(17, 96)
    grid = Grid(group_size=32)
    ordered, plain = (
        solve_gptq(weight, hessian, grid, scale_dtype=torch.float16, act_order=act_order).tensor
        for act_order in (True, False)
    )
    rounded = quantize_rtn(weight, grid, scale_dtype=torch.float16)
    for tensor in (ordered, plain):
        assert torch.equal(tensor.scales, rounded.scales)
        assert torch.equal(tensor.zeros, rounded.zeros)
        assert tensor.integers.shape == rounded.integers.shape
        # Were columns written back in another order, values would be far off their own weights.
        assert torch.corrcoef(torch.stack([tensor.dequantize().flatten(), weight.flatten()]))[0, 1] > 0.9
    assert not torch.equal(ordered.integers, plain.integers)


def test_loss_is_the_relative_output_error() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    solved = solve_gptq(weight, inputs.T @ inputs, Grid(group_size=32), scale_dtype=torch.float16)
    outputs = inputs @ weight.T
    error = (inputs @ solved.tensor.dequantize().T - outputs).square().sum() / outputs.square().sum()
    assert solved.loss_relative_to_output_energy == pytest.approx(float(error), rel=1e-4)
    assert output_loss(weight, weight, torch.zeros(64, 64)) == 0.0


def test_dead_columns_are_rounded_to_nearest_and_do_not_disturb_the_others() -> None:
    weight, hessian = sample(17, 64)
    dead = torch.tensor([0, 13, 63])
    live = torch.tensor([i for i in range(64) if i not in dead.tolist()])
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    grid = Grid(group_size=-1)
    solved = solve_gptq(weight, hessian, grid, scale_dtype=torch.float16).tensor
    rounded = quantize_rtn(weight, grid, scale_dtype=torch.float16)
    assert torch.equal(solved.integers[:, dead], rounded.integers[:, dead])
    assert not torch.equal(solved.integers[:, live], rounded.integers[:, live])
    filled = hessian.clone()
    filled[dead, dead] = hessian.diagonal()[live].mean()
    expected = naive(weight, filled, grid, damp=0.05, act_order=True)
    assert torch.equal(solved.integers[:, live], expected[:, live])


def test_a_module_without_any_input_is_rounded() -> None:
    weight, _ = sample(3, 32)
    solved = solve_gptq(weight, torch.zeros(32, 32), Grid(group_size=32), scale_dtype=torch.float16)
    rounded = quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.float16)
    assert torch.equal(solved.tensor.integers, rounded.integers)
    assert solved.loss_relative_to_output_energy == 0.0


def test_damping_is_raised_tenfold_until_positive_definite() -> None:
    weight, _ = sample(5, 32)
    indefinite = torch.eye(32)
    indefinite[0, 1] = indefinite[1, 0] = 3.0  # eigenvalue -2 beside a mean diagonal of 1
    solved = solve_gptq(weight, indefinite, Grid(group_size=32), scale_dtype=torch.float16, damp=0.05)
    assert solved.damp_used == pytest.approx(5.0)
    damped = indefinite + 4.95 * torch.eye(32)  # what is left for the naive one to damp
    expected = naive(weight, damped, Grid(group_size=32), damp=0.05 / 5.95, act_order=True)
    assert torch.equal(solved.tensor.integers, expected)


def test_enough_damping_is_used_as_given() -> None:
    weight, hessian = sample(5, 32)
    assert solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16).damp_used == 0.05


def test_a_hopeless_hessian_is_an_error() -> None:
    weight, _ = sample(5, 32)
    hopeless = torch.eye(32)
    hopeless[0, 1] = hopeless[1, 0] = 1e6
    with pytest.raises(UnsupportedModelError, match="not positive definite at any damping up to 100.*calibration text"):
        solve_gptq(weight, hopeless, Grid(group_size=32), scale_dtype=torch.float16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_an_error(value: float) -> None:
    weight, hessian = sample(5, 32)
    hessian[3, 4] = value
    with pytest.raises(UnsupportedModelError, match="inputs of the module held NaN or infinity.*'rtn'"):
        solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    weight, hessian = sample(5, 32)
    weight[0, 0] = math.nan
    with pytest.raises(ArtifactError, match="the weight holds NaN or infinity"):
        solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damp": 0.0}, r"damping 0\.0 cannot be used"),
        ({"damp": -0.1}, r"damping -0\.1 cannot be used"),
        ({"damp": math.nan}, "damping nan cannot be used"),
        ({"damp": 101.0}, r"damping 101\.0 cannot be used; use a number above 0 and up to 100"),
        ({"block": 0}, "block 0 cannot be used"),
    ],
)
def test_arguments_out_of_range_are_errors(arguments: dict[str, float], message: str) -> None:
    weight, hessian = sample(5, 32)
    with pytest.raises(ConfigError, match=message):
        solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16, **arguments)  # type: ignore[arg-type]


def test_a_hessian_of_another_shape_is_an_error() -> None:
    weight, hessian = sample(5, 64)
    with pytest.raises(ConfigError, match=r"Hessian has shape \(63, 63\).*needs \(64, 64\)"):
        solve_gptq(weight, hessian[1:, 1:], Grid(group_size=32), scale_dtype=torch.float16)


def test_weight_and_hessian_are_not_changed() -> None:
    weight, hessian = sample(5, 64)
    hessian[3] = hessian[:, 3] = 0
    before = weight.clone(), hessian.clone()
    solve_gptq(weight, hessian, Grid(group_size=32), scale_dtype=torch.float16)
    solve_gptq(weight.double(), hessian.double(), Grid(group_size=32), scale_dtype=torch.float16)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
