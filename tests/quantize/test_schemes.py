"""Schemes of floats, against the nearest of all codes by trying each, and scales by trying all that can be stored."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import (
    Clip,
    Grid,
    ProtectionPlan,
    bits_of_precision,
    load,
    save,
)
from quant_fairness_plugin.artifacts.files import from_json
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.quantize.codes import codes_of
from quant_fairness_plugin.quantize.floats import divisor_of
from quant_fairness_plugin.quantize.gptq import output_loss, refine_result, solve_gptq
from quant_fairness_plugin.quantize.grid import QuantizedTensor, fit, quantize_rtn, shared_largest
from quant_fairness_plugin.quantize.grid_rules import check_grid, misfit, unit_grid
from quant_fairness_plugin.quantize.results import StoredResults
from quant_fairness_plugin.quantize.schemes import E2M1, E4M3, SCHEMES
from quant_fairness_plugin.quantize.solving import Solved

NAMES = sorted(SCHEMES)
ZERO = torch.zeros((), dtype=torch.uint8)


def grid_of(name: str, clip: Clip = "mse") -> Grid:
    return SCHEMES[name].grid(clip)


def every_number(grid: Grid) -> list[tuple[float, int]]:
    """Each number of a grid with its code, as bits say them; none twice, and none that is no number."""
    numbers = []
    for code in range(2**grid.bits):
        sign, bits = divmod(code, 2 ** (grid.bits - 1))
        exponents, mantissas, bias = (4, 8, 7) if grid.bits == 8 else (2, 2, 1)
        exponent, mantissa = divmod(bits, mantissas)
        assert exponent < 2**exponents
        if grid.bits == 8 and bits == 127:
            continue
        value = (
            2.0 ** (exponent - bias) * (1 + mantissa / mantissas)
            if exponent
            else 2.0 ** (1 - bias) * mantissa / mantissas
        )
        if not (sign and value == 0):
            numbers.append((-value if sign else value, code))
    return numbers


def nearest(value: float, numbers: list[tuple[float, int]]) -> int:
    """The code of the nearest number; of two that are as near, the one whose last bit is 0."""
    least = min(abs(value - number) for number, _ in numbers)
    return min((code for number, code in numbers if abs(value - number) == least), key=lambda code: (code & 1, code))


def test_numbers_are_those_of_torch_and_of_the_standard() -> None:
    assert E2M1 == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    bits = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(torch.tensor(E4M3), bits.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_of_all(name: str, dtype: torch.dtype) -> None:
    grid = grid_of(name)
    numbers, codes = every_number(grid), codes_of(grid)
    assert len(numbers) == 2**grid.bits - (3 if grid.bits == 8 else 1)
    exact = sorted(number for number, _ in numbers)
    ties = [(a + b) / 2 for a, b in zip(exact, exact[1:], strict=False)]
    drawn = (torch.randn(400, dtype=torch.float64) * torch.logspace(-4, 3.5, 400, dtype=torch.float64)).to(dtype)
    values = [*exact, *ties, *drawn.tolist(), 1e6, -1e6]
    found = codes.nearest(torch.tensor(values, dtype=dtype), ZERO)
    assert found.tolist() == [nearest(value, numbers) for value in values]
    assert codes.numbers(found, ZERO, dtype).tolist() == [dict((c, n) for n, c in numbers)[c] for c in found.tolist()]


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_its_codes_times_stored_scales(name: str, clip: Clip) -> None:
    grid = grid_of(name, clip)
    weight = torch.randn(3, 64) * torch.logspace(-3, 0, 64)
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.bfloat16)
    numbers, dense = every_number(grid), tensor.dequantize()
    by_code = {code: number for number, code in numbers}
    size = 64 if grid.group_size == -1 else grid.group_size
    divisor = 1.0 if tensor.divisor is None else float(tensor.divisor)
    for row in range(3):
        for col in range(64):
            step = float(tensor.scales[row, col // size].float()) / divisor
            assert int(tensor.integers[row, col]) == nearest(float(weight[row, col] / step), numbers)
            assert float(dense[row, col]) == by_code[int(tensor.integers[row, col])] * step


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_no_scale_that_can_be_stored_is_better_than_that_of_clip_mse(name: str) -> None:
    """Of all scales within two factors of two below that of the full range, and those above that bring anything."""
    grid = grid_of(name)
    weight = torch.randn(12, grid.group_size) * torch.logspace(-3, 0, 12).unsqueeze(1)
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.bfloat16)
    error = (tensor.dequantize() - weight).square().sum(1)
    full = weight.abs().amax(1) / 6
    kind = torch.float8_e4m3fn if name == "nvfp4" else torch.float8_e8m0fnu
    storable = torch.arange(1, 127 if name == "nvfp4" else 255, dtype=torch.uint8).view(kind).float()
    codes, divisor = codes_of(grid), 1.0 if tensor.divisor is None else float(tensor.divisor)
    for row in range(12):
        tried = [step for step in (storable / divisor).tolist() if 0.26 <= step / float(full[row]) <= 1.4]
        errors = []
        for step in tried:
            rounded = codes.numbers(codes.nearest(weight[row] / step, ZERO), ZERO) * step
            errors.append(float((rounded - weight[row]).square().sum()))
        assert float(error[row]) <= min(errors) * (1 + 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_mse_loses_no_more_than_absmax(name: str) -> None:
    weight = torch.randn(16, 128)
    grids = (grid_of(name, "mse"), grid_of(name, "absmax"))
    mse, absmax = (quantize_rtn(weight, grid, scale_dtype=torch.bfloat16).dequantize() - weight for grid in grids)
    assert mse.norm() < absmax.norm()


@pytest.mark.parametrize("size", [1e-20, 3e-4, 1.0, 77.0, 1e20])
def test_a_divisor_is_a_power_of_two_that_fills_the_scales(size: float) -> None:
    weight = torch.randn(4, 32) * size
    tensor = quantize_rtn(weight, grid_of("nvfp4", "absmax"), scale_dtype=torch.bfloat16)
    assert tensor.divisor is not None
    assert torch.frexp(tensor.divisor)[0].item() == 0.5
    assert 216 <= float(tensor.scales.float().max()) <= 448


def test_no_product_has_more_than_the_eight_bits_of_bfloat16() -> None:
    """So readers that unpack in bfloat16 compute with the very values that were measured."""
    for name in ("nvfp4", "mxfp4"):
        dense = quantize_rtn(torch.randn(32, 64), grid_of(name), scale_dtype=torch.bfloat16).dequantize()
        assert torch.equal(dense.bfloat16().float(), dense)


def test_modules_that_servers_merge_share_a_divisor() -> None:
    large, small, grid = torch.randn(4, 32), 0.01 * torch.randn(8, 32), grid_of("nvfp4")
    largest = shared_largest([large, small], grid)
    assert largest == float(large.abs().max())
    both = [quantize_rtn(weight, grid, scale_dtype=torch.bfloat16, largest=largest) for weight in (large, small)]
    assert both[0].divisor is not None
    assert torch.equal(both[0].divisor, both[1].divisor)  # type: ignore[arg-type]
    alone = quantize_rtn(small, grid, scale_dtype=torch.bfloat16)
    assert float(alone.divisor) > float(both[1].divisor)  # type: ignore[arg-type]
    assert shared_largest([large, small], grid_of("mxfp4")) is None
    assert shared_largest([large, small], Grid()) is None


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_tiny_values_stay_finite(name: str) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 3], weight[2] = 1e-30, 1.0
    dense = quantize_rtn(weight, grid_of(name), scale_dtype=torch.bfloat16).dequantize()
    assert torch.isfinite(dense).all()
    assert not dense[0].any()
    torch.testing.assert_close(dense[2], weight[2], atol=0, rtol=0.07)  # half of a step of a scale in E4M3
    assert torch.equal(divisor_of(0.0, SCHEMES["nvfp4"]), torch.ones(1))


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        quantize_rtn(torch.full((2, 32), torch.nan), grid_of(name), scale_dtype=torch.bfloat16)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="too large for torch.float16; load a bfloat16"):
        quantize_rtn(torch.full((2, 32), 1e9), grid_of("fp8"), scale_dtype=torch.float16)


def naive_gptq(weight: Tensor, hessian: Tensor, tensor: QuantizedTensor, *, damp: float) -> Tensor:
    """Optimal Brain Quantization, largest diagonal first, with the inverse itself, on the steps of a tensor."""
    numbers, cols = every_number(tensor.grid), weight.shape[1]
    by_code, steps = {code: number for number, code in numbers}, tensor.steps.double()
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    inverse = torch.linalg.inv(hessian + damp * diagonal.mean() * torch.eye(cols, dtype=torch.float64))
    work, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    left = sorted(range(cols), key=lambda j: -float(diagonal[j]))
    while left:
        j = left.pop(0)
        step = steps[:, j * steps.shape[1] // cols]
        codes[:, j] = torch.tensor([nearest(float(value), numbers) for value in work[:, j] / step], dtype=torch.uint8)
        value = torch.tensor([by_code[int(code)] for code in codes[:, j]], dtype=torch.float64) * step
        error = (work[:, j] - value) / inverse[j, j]
        for k in left:
            work[:, k] -= error * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j, :]) / inverse[j, j]
    return codes


def correlated(cols: int) -> Tensor:
    """The second moment of inputs that have much in common."""
    inputs = torch.randn(256, cols // 4) @ torch.randn(cols // 4, cols) + 0.3 * torch.randn(256, cols)
    return inputs.T @ inputs


@pytest.mark.parametrize("name", NAMES)
def test_gptq_is_the_naive_one_on_floats(name: str) -> None:
    weight, hessian = torch.randn(5, 64), correlated(64)
    result = solve_gptq(weight, hessian, grid_of(name), scale_dtype=torch.bfloat16, damp=0.05)
    expected = naive_gptq(weight, hessian, result.tensor, damp=0.05)
    assert (result.tensor.integers == expected).float().mean() > 0.99  # a tie may fall the other way
    rounded = quantize_rtn(weight, grid_of(name), scale_dtype=torch.bfloat16)
    assert torch.equal(rounded.scales.float(), result.tensor.scales.float())
    assert result.loss_relative_to_output_energy < 0.8 * output_loss(weight, rounded.dequantize(), hessian)


@pytest.mark.parametrize("name", NAMES)
def test_refinement_makes_nothing_worse_on_floats(name: str) -> None:
    weight, hessian = torch.randn(9, 64), correlated(64)
    once = solve_gptq(weight, hessian, grid_of(name), scale_dtype=torch.bfloat16, damp=0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(64)
    losses = [output_loss(weight, once.tensor.dequantize(), damped)]
    for rounds in (1, 4):
        refined = refine_result(once, weight, hessian, damp=0.05, rounds=rounds)
        losses.append(output_loss(weight, refined.tensor.dequantize(), damped))
        if name != "fp8":  # scales of 8 bits stay
            assert torch.equal(refined.tensor.scales.float(), once.tensor.scales.float())
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * (1 + 1e-6)


def test_no_other_float_in_one_place_would_be_better() -> None:
    """Refinement comes to rest where each code is the best given all others, tried one by one."""
    weight, hessian, grid = torch.randn(2, 32), correlated(32), grid_of("mxfp4")
    once = solve_gptq(weight, hessian, grid, scale_dtype=torch.bfloat16, damp=0.05)
    tensor = refine_result(once, weight, hessian, damp=0.05, rounds=50).tensor
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(32)

    def lost(codes: Tensor) -> float:
        change = (replace(tensor, integers=codes).dequantize() - weight).double()
        return float(((change @ damped.double()) * change).sum())

    least = lost(tensor.integers)
    for row, col in ((0, 0), (0, 17), (1, 5), (1, 31)):
        for code in range(16):
            other = tensor.integers.clone()
            other[row, col] = code
            assert lost(other) >= least * (1 - 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "scheme 'nvfp4' with bits 8"),
        ({"group_size": 32}, "accepted are 4 bits, group size 16"),
        ({"symmetric": False}, "symmetric False"),
        ({"clip": "laplace"}, "clip absmax or mse"),
    ],
)
def test_a_scheme_has_one_grid(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_grid(replace(grid_of("nvfp4"), **change))


def test_grids_have_names_and_groups_of_their_own() -> None:
    assert [str(grid_of(name, "absmax")) for name in NAMES] == [
        "fp8 channel absmax",
        "mxfp4 g32 absmax",
        "nvfp4 g16 absmax",
    ]
    assert [grid_of(name).precision for name in NAMES] == NAMES
    assert [bits_of_precision(grid_of(name).precision) for name in NAMES] == [8, 4, 4]
    assert [grid_of(name).numbers for name in NAMES] == ["FP8", "MXFP4", "NVFP4"]
    assert (Grid().precision, Grid().numbers) == ("int4", "4 bit")
    nvfp4 = grid_of("nvfp4")
    assert unit_grid(nvfp4, (48,)) == nvfp4
    assert misfit(nvfp4, 8, 24) == "24 input channels are not a multiple of group size 16"
    assert (nvfp4.at("nvfp4"), nvfp4.at("int8")) == (nvfp4, Grid(bits=8, clip="mse"))


def test_plans_of_floats_and_plans_from_before_are_read(tmp_path: Path) -> None:
    plan = ProtectionPlan.unprotected("m", 2, grid_of("nvfp4"))
    assert set(plan.units.values()) == {"nvfp4"}
    assert not plan.overrides
    save(plan, tmp_path / "plan.json")
    assert load(ProtectionPlan, tmp_path / "plan.json") == plan
    before = json.loads((tmp_path / "plan.json").read_text())
    before["units"] = {name: "int4" for name in before["units"]}
    before["grid"] = {key: value for key, value in asdict(Grid()).items() if key != "scheme"}
    assert from_json(ProtectionPlan, json.dumps(before), "before") == ProtectionPlan.unprotected("m", 2, Grid())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_solved_is_kept_on_disk(name: str, tmp_path: Path) -> None:
    tensor = quantize_rtn(torch.randn(8, 64), grid_of(name), scale_dtype=torch.bfloat16)
    StoredResults(tmp_path).add(0, Solved(tensors={"a.b": tensor}))
    [kept] = StoredResults(tmp_path).layer(0).tensors.values()
    assert kept.grid == tensor.grid
    assert kept.scales.dtype == tensor.scales.dtype
    assert torch.equal(kept.dequantize(), tensor.dequantize())


def test_a_weight_of_no_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 32 does not divide 48 input channels"):
        fit(torch.randn(2, 48), grid_of("mxfp4"), scale_dtype=torch.bfloat16)
