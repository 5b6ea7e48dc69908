from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.quantize.awq import AwqResult, solve_awq
from quant_fairness_plugin.quantize.gptq import output_loss
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.moments import FairMagnitude, LanguageMoment

GRID = Grid(bits=4, group_size=32, symmetric=False)


def inputs(columns: int, *, outliers: int = 4) -> Tensor:
    """200 tokens, a few channels 30 times as large as the others."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, columns, generator=draw)
    x[:, :: columns // outliers] *= 30
    return x


def weight_of(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def solve(
    weights: dict[str, Tensor], x: Tensor, grid: Grid = GRID, *, fold: bool = True, clipped: tuple[str, ...] = ()
) -> tuple[dict[str, AwqResult], Tensor]:
    hessian = (x.T @ x / len(x)).double()
    return solve_awq(
        weights,
        dict.fromkeys(weights, hessian),
        x.abs().mean(0),
        dict.fromkeys(weights, grid),
        scale_dtype=torch.float16,
        effective=(lambda scale: scale) if fold else None,
        clipped=clipped,
    )


def naive_grid(values: list[float], bits: int) -> tuple[float, int]:
    """Scale and zero point of one group of an asymmetric grid."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    return scale, round(-low / scale)


def naive_round(values: list[float], scale: float, zero: int, bits: int) -> list[float]:
    top = 2**bits - 1
    return [(min(max(round(v / scale) + zero, 0), top) - zero) * scale for v in values]


def naive_loss(weight: Tensor, changed: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight - changed).double().T).square().sum() / len(x))


def naive_scale(weight: Tensor, x: Tensor, bits: int, size: int) -> Tensor:
    """The best of the 20 candidates, one group of one row at a time."""
    rows, columns = weight.shape
    magnitude = x.abs().mean(0)
    best, least = torch.ones(columns), float("inf")
    for step in range(20):
        candidate = magnitude ** (step / 20)
        scale = candidate / (candidate.max() * candidate.min()).sqrt()
        changed = torch.zeros_like(weight)
        for i, row in enumerate((weight * scale).tolist()):
            for start in range(0, columns, size):
                group = row[start : start + size]
                rounded = naive_round(group, *naive_grid(group, bits), bits)
                changed[i, start : start + size] = torch.tensor(rounded) / scale[start : start + size]
        loss = naive_loss(weight, changed, x)
        if loss < least:
            best, least = scale, loss
    return best


def test_scale_and_integers_equal_those_of_a_naive_search() -> None:
    weight, x = weight_of(9, 64), inputs(64)
    results, scale = solve({"w": weight}, x)
    expected = naive_scale(weight, x, bits=4, size=32)
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0)  # float32 powers in another order
    rounded = quantize_rtn(weight * expected, GRID, scale_dtype=torch.float16)
    # A scale that differs in its last bit may move a weight that lies between two integers.
    assert (results["w"].tensor.integers == rounded.integers).float().mean() > 0.99


def naive_clip(weight: Tensor, x: Tensor, bits: int, size: int) -> Tensor:
    """The dequantized weight with each group's range chosen by its own output error, group by group."""
    changed = torch.zeros_like(weight)
    for i, row in enumerate(weight.tolist()):
        for start in range(0, len(row), size):
            group, part = row[start : start + size], x[:, start : start + size].double()
            top = max(map(abs, group))
            best, least = group, float("inf")
            keeps = [1 - step / 20 for step in range(11)]
            cut = [[min(max(v, -keep * top), keep * top) for v in group] for keep in keeps]
            for limited in cut + [[v * keep for v in group] for keep in keeps[1:]]:
                rounded = naive_round(group, *naive_grid(limited, bits), bits)
                error = torch.tensor(rounded).double() - torch.tensor(group).double()
                loss = float((part @ error).square().sum())
                if loss < least * (1 - 1e-6):  # the first of equals
                    best, least = rounded, loss
            changed[i, start : start + size] = torch.tensor(best)
    return changed


def test_clipping_equals_a_naive_search_over_the_outputs_of_each_group() -> None:
    weight, x = weight_of(7, 64), inputs(64)
    weight[:, 5] *= 6  # a lone weight that stretches its group, on an input that hardly matters
    grid = Grid(bits=3, group_size=32, symmetric=False)
    clipped = solve({"w": weight}, x, grid, fold=False, clipped=("w",))[0]["w"].tensor.dequantize()
    plain = solve({"w": weight}, x, grid, fold=False)[0]["w"].tensor.dequantize()
    expected = naive_clip(weight, x, bits=3, size=32)
    same = (clipped - expected).abs().view(7, 2, 32).amax(2) < 1e-6
    assert same.float().mean() > 0.9  # two ranges of nearly the same loss may change places in float32
    assert (clipped != plain).any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 64), (8, 32), (4, -1)])
def test_it_is_nearer_than_rounding_where_a_few_inputs_are_large(bits: int, group_size: int, symmetric: bool) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    weight, x = weight_of(48, 128), inputs(128)
    hessian = (x.T @ x / len(x)).double()
    rounded = quantize_rtn(weight, grid, scale_dtype=torch.float16).dequantize()
    results, scale = solve({"w": weight}, x, grid, clipped=("w",))
    assert results["w"].tensor.grid == grid
    loss = results["w"].loss_relative_to_output_energy
    assert loss == pytest.approx(output_loss(weight, results["w"].tensor.dequantize() / scale, hessian))
    # Rounding error is the same everywhere; four of 128 channels carry 97 % of the input.
    assert loss < 0.6 * output_loss(weight, rounded, hessian)
    assert scale[0] > 1.5 * scale[1]


def test_modules_of_a_fusion_group_share_one_scale() -> None:
    x = inputs(64)
    weights = {"q": weight_of(16, 64), "k": weight_of(8, 64, seed=1)}
    together, scale = solve(weights, x)
    assert list(together) == ["q", "k"]
    for name, weight in weights.items():
        expected = quantize_rtn(weight * scale, GRID, scale_dtype=torch.float16)
        assert torch.equal(together[name].tensor.integers, expected.integers)


def test_without_a_fold_nothing_is_scaled() -> None:
    weight, x = weight_of(8, 64), inputs(64)
    results, scale = solve({"w": weight}, x, fold=False)
    assert torch.equal(scale, torch.ones(64))
    expected = quantize_rtn(weight, GRID, scale_dtype=torch.float16)
    assert torch.equal(results["w"].tensor.integers, expected.integers)


def test_a_clipping_rule_of_the_grid_replaces_the_search() -> None:
    weight, x = weight_of(8, 64), inputs(64)
    grid = Grid(bits=3, group_size=32, symmetric=False, clip="mse")
    found = solve({"w": weight}, x, grid, fold=False, clipped=("w",))[0]["w"].tensor
    expected = quantize_rtn(weight, grid, scale_dtype=torch.float16)
    assert torch.equal(found.scales, expected.scales)


def test_channels_without_input_or_weight_are_harmless() -> None:
    weight, x = weight_of(8, 64), inputs(64)
    x[:, 3] = 0
    weight[:, 7] = 0
    weight[2] = 0
    results, scale = solve({"w": weight}, x, clipped=("w",))
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.isfinite(results["w"].tensor.dequantize()).all()
    assert torch.equal(results["w"].tensor.dequantize()[2], torch.zeros(64))
    nothing, _ = solve({"w": weight}, torch.zeros(5, 64), clipped=("w",))
    assert nothing["w"].loss_relative_to_output_energy == 0


def test_the_scale_is_the_one_that_the_source_was_really_divided_by() -> None:
    weight, x = weight_of(8, 64), inputs(64)
    asked: list[Tensor] = []

    def coarse(scale: Tensor) -> Tensor:
        asked.append(scale)
        return 2 ** scale.log2().round()

    hessian = (x.T @ x).double()
    results, scale = solve_awq(
        {"w": weight},
        {"w": hessian},
        x.abs().mean(0),
        {"w": GRID},
        scale_dtype=torch.float16,
        effective=coarse,
        clipped=(),
    )
    assert torch.equal(scale, 2 ** scale.log2().round())
    expected = quantize_rtn(weight * scale, GRID, scale_dtype=torch.float16)
    assert torch.equal(results["w"].tensor.integers, expected.integers)
    assert len(asked) > 20  # all ratios, and the start


def test_a_loud_language_does_not_dominate_the_magnitude() -> None:
    first, second = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 3.0])
    moments = [
        LanguageMoment("en", torch.eye(4), first),
        LanguageMoment("he", torch.eye(4), 1000 * second),
        LanguageMoment("xx", torch.eye(4), torch.zeros(4)),
    ]
    magnitude = FairMagnitude({"en": 0.5, "he": 0.25, "xx": 0.25})
    assert list(magnitude.watch(moments)) == moments
    torch.testing.assert_close(magnitude.value, torch.tensor([1.5, 0.5, 0.25, 0.75]))
