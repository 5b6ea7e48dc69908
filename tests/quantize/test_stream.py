from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ArtifactError, ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.model.exchange import stored_form, swapped
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize import solve_blocks, solving
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.gptq import refine_result, solve_gptq, solve_on_grid
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.moments import FairMoments
from tests.planning import quantize_layers
from tests.tiny import FAMILIES

Load = Callable[..., LoadedModel]
Rows = tuple[tuple[int, ...], ...]
GRID = Grid(bits=3, group_size=32)


def state(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in loaded.model.state_dict().items()}


def assert_untouched(loaded: LoadedModel, before: dict[str, Tensor]) -> None:
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
    for module in loaded.model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def own_inputs(loaded: LoadedModel, module: nn.Module, language_rows: Rows) -> Tensor:
    """What the model gives a module, one row at a time: float64 `[tokens, cols]`."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for row in language_rows:
            loaded.model(torch.tensor([row]))
    handle.remove()
    return torch.cat(found).double()


def fair_hessian(weight: Tensor, inputs: dict[str, Tensor], shares: dict[str, float]) -> Tensor:
    """Σ w XᵀX / ‖X Wᵀ‖²: the squared output error of each language over its squared output."""
    total = torch.zeros((), dtype=torch.float64)
    for language, x in inputs.items():
        total = total + shares[language] * x.T @ x / (x @ weight.double().T).square().sum()
    return total


def shrunk(hessian: Tensor, share: float) -> Tensor:
    """A matrix of which every place off the diagonal keeps 1 - share."""
    size = len(hessian)
    kept = [[1.0 if i == j else 1 - share for j in range(size)] for i in range(size)]
    return hessian * torch.tensor(kept, dtype=hessian.dtype)


def right_target(
    weight: Tensor, inputs: dict[str, Tensor], right: dict[str, Tensor], shares: dict[str, float], hessian: Tensor
) -> Tensor:
    """W + W A (H + λI)⁻¹, with A of single tokens: what comes closest to W x₁₆ on x, languages weighed as in H."""
    wide, size = weight.double(), weight.shape[1]
    across = torch.zeros(size, size, dtype=torch.float64)
    for name, given in inputs.items():
        for x16, x in zip(right[name], given, strict=True):
            across += shares[name] / (given @ wide.T).square().sum() * torch.outer(x16 - x, x)
    tokens = sum(len(side) for side in inputs.values())  # every language counts the same here
    ridge = 10 * size / tokens * hessian.trace() / size
    return wide + wide @ across @ torch.linalg.inv(hessian + ridge * torch.eye(size, dtype=torch.float64))


def solve_naively(
    loaded: LoadedModel, protected: set[int], rows: CalibrationSet, streamed: Mapping[str, QuantizedTensor]
) -> dict[str, Tensor]:
    """GPTQ with whole forward passes, one row at a time: integers by module. Leaves the model quantized.

    Behind a module stands what was found for it, not the naive solution: where a weight lies between two integers, the
    last bits decide, and everything behind it would differ.
    """
    integers: dict[str, Tensor] = {}
    original, usual = replace(loaded, model=copy.deepcopy(loaded.model)), Gptq()
    for layer in sorted(set(range(loaded.layers)) - protected):
        for unit in loaded.family.units:
            names = [f"{loaded.family.blocks}.{layer}.{module}" for module in unit.modules]
            first = loaded.linears(layer)[names[0]]
            twin = original.linears(layer)[names[0]]
            inputs, right = (
                {language: own_inputs(model, module, found) for language, found in rows.rows.items()}
                for model, module in ((loaded, first), (original, twin))
            )
            for name in names:
                module = loaded.linears(layer)[name]
                weight = linear_weight(module)
                damp = weight.shape[1] / sum(map(len, inputs.values()))
                hessian = shrunk(fair_hessian(weight, inputs, rows.shares), min(damp, 0.5))
                target = right_target(weight, inputs, right, rows.shares, hessian).float()
                once = solve_gptq(target, hessian, GRID, scale_dtype=torch.float16, damp=damp)
                solved = refine_result(once, target, hessian, damp=damp, rounds=usual.refinements)
                integers[name] = solved.tensor.integers
                set_linear_weight(module, streamed[name].dequantize())
    return integers


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_quantizes_every_family_and_leaves_the_model_as_it_was(
    load: Load, rows: CalibrationSet, family: str
) -> None:
    loaded = load(family)
    before = state(loaded)
    done: list[tuple[int, int]] = []
    quantized = quantize_layers(
        loaded, [0], method="gptq", grid=GRID, calibration=rows, progress=lambda n, total: done.append((n, total))
    )
    assert_untouched(loaded, before)
    assert tuple(quantized.tensors) == loaded.family.full_names(1)
    assert quantized.losses.keys() == quantized.damping.keys() == quantized.tensors.keys()
    assert all(0 < loss < 0.2 for loss in quantized.losses.values())
    tokens = rows.telling_tokens
    for name, module in loaded.linears(1).items():
        assert quantized.damping[name] == pytest.approx(linear_weight(module).shape[1] / tokens)
    assert quantized.kept == {}
    assert quantized.plan.protected_layers == (0,)
    assert done == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("family", "protected"), [("llama", {1}), ("bloom", set()), ("gpt_neox", {0}), ("gpt2", {2})])
def test_integers_equal_those_from_whole_forward_passes(
    load: Load, rows: CalibrationSet, family: str, protected: set[int]
) -> None:
    loaded = load(family, layers=3)
    streamed = quantize_layers(loaded, protected, method="gptq", grid=GRID, calibration=rows).tensors
    naive = solve_naively(loaded, protected, rows, streamed)
    assert streamed.keys() == naive.keys()
    for name, integers in naive.items():
        # Batched float32 forward passes round differently, which may move a weight that lies between two integers.
        assert (streamed[name].integers == integers).float().mean() > 0.999, name


def test_gptq_is_nearer_to_the_16_bit_model_than_rounding(load: Load, rows: CalibrationSet) -> None:
    loaded = load(layers=3)
    ids = torch.tensor(rows.rows["he"][:1])

    @torch.no_grad()
    def divergence(weights: dict[str, Tensor]) -> float:
        reference = loaded.model(ids).logits.log_softmax(-1)
        with swapped(loaded, weights):
            changed = loaded.model(ids).logits.log_softmax(-1)
        return float((reference.exp() * (reference - changed)).sum(-1).mean())

    solved = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    rounded = quantize_layers(loaded, (), method="rtn", grid=GRID)
    assert 0 < divergence(solved.dense_weights()) < 0.8 * divergence(rounded.dense_weights())


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_rtn_rounds_every_unprotected_module(load: Load, family: str) -> None:
    loaded = load(family)
    before = state(loaded)
    quantized = quantize_layers(loaded, [1], method="rtn", grid=GRID)
    assert_untouched(loaded, before)
    assert tuple(quantized.tensors) == loaded.family.full_names(0)
    for name, module in loaded.linears(0).items():
        expected = quantize_rtn(linear_weight(module), GRID, scale_dtype=torch.float16)
        assert torch.equal(quantized.tensors[name].integers, expected.integers)
    assert quantized.losses == {}
    dense = quantized.dense_weights()
    assert tuple(dense) == loaded.family.full_names(0)
    for name, module in loaded.linears(0).items():
        assert torch.equal(dense[name], stored_form(module, quantized.tensors[name].dequantize()))


def test_the_same_calibration_gives_the_same_integers(load: Load, rows: CalibrationSet) -> None:
    first, again = (quantize_layers(load(), (), method="gptq", grid=GRID, calibration=rows) for _ in range(2))
    assert first.losses == again.losses
    assert all(torch.equal(first.tensors[name].integers, again.tensors[name].integers) for name in first.tensors)


def test_later_layers_see_the_quantized_earlier_ones(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    both = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    second = quantize_layers(loaded, [0], method="gptq", grid=GRID, calibration=rows)
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(both.tensors[name].integers, second.tensors[name].integers)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [3, 5, 10])
def test_an_error_midway_leaves_the_model_as_it_was(
    load: Load, rows: CalibrationSet, monkeypatch: pytest.MonkeyPatch, calls: int, error: type[BaseException]
) -> None:
    loaded = load("qwen2")
    loaded.model.train()
    loaded.block(0).eval()
    modes = [module.training for module in loaded.model.modules()]
    before = state(loaded)
    left = calls

    def fail_after(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            assert any(not torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items()), (
                "the work had not begun"
            )
            raise error("planted")
        return solve_on_grid(*arguments, **named)

    monkeypatch.setattr(solving, "solve_on_grid", fail_after)
    with pytest.raises(error, match="planted"):
        quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    assert_untouched(loaded, before)
    assert [module.training for module in loaded.model.modules()] == modes


def test_dropout_is_off_while_calibrating_and_modes_are_given_back(load: Load, rows: CalibrationSet) -> None:
    loaded = load("gpt2")  # has dropout 0.1
    calm = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    loaded.model.train()
    trained = quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows)
    assert trained.losses == calm.losses
    assert all(module.training for module in loaded.model.modules())


def test_modules_that_the_group_does_not_fit_stay_in_16_bit(load: Load, rows: CalibrationSet) -> None:
    loaded = load(width=48)
    quantized = quantize_layers(loaded, [1], method="gptq", grid=GRID, calibration=rows)
    assert list(quantized.tensors) == ["model.layers.0.mlp.down_proj"]
    assert quantized.kept["model.layers.0.mlp.up_proj"] == "48 input channels are not a multiple of group size 32"


def test_raised_damping_is_reported(
    load: Load, rows: CalibrationSet, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def indefinite(*_: object) -> FairMoments:
        moment = torch.eye(32, dtype=torch.float64)
        moment[0, 1] = moment[1, 0] = 3.0
        return FairMoments({f"model.layers.0.self_attn.{name}_proj": moment for name in "qkv"}, {})

    loaded = load()
    monkeypatch.setattr(loaded.family.__class__, "units_of", lambda family, layer: family.units[:1])
    monkeypatch.setattr(solve_blocks, "fair_moments", indefinite)
    quantized = quantize_layers(loaded, [1], method=Gptq(damp=0.05), grid=GRID, calibration=rows)
    assert quantized.damping["model.layers.0.self_attn.q_proj"] == pytest.approx(5.0)
    assert "model.layers.0.self_attn.q_proj: damping raised from 0.05 to 5" in caplog.text


def test_inputs_that_are_not_finite_name_the_module(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.1.input_layernorm.weight").fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.self_attn\.q_proj: the inputs .* NaN"):
        quantize_layers(loaded, (), method="gptq", grid=GRID, calibration=rows, strict=True)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite_name_the_module(load: Load, rows: CalibrationSet, method: Any) -> None:
    loaded = load()
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.0.self_attn.v_proj.weight")[0, 0] = math.inf
    calibration = rows if method == "gptq" else None
    with pytest.raises(ArtifactError, match=r"^model\.layers\.0\.self_attn\.v_proj: the weight holds NaN"):
        quantize_layers(loaded, (), method=method, grid=GRID, calibration=calibration)


def test_arguments_that_do_not_go_together_are_errors(load: Load, rows: CalibrationSet) -> None:
    loaded = load()
    with pytest.raises(ConfigError, match="'gptq' needs calibration text"):
        quantize_layers(loaded, (), method="gptq", grid=GRID)
    with pytest.raises(ConfigError, match="'rtn' uses no calibration text"):
        quantize_layers(loaded, (), method="rtn", grid=GRID, calibration=rows)
    with pytest.raises(ConfigError, match="'awq' needs calibration text"):
        quantize_layers(loaded, (), method="awq", grid=GRID)
    with pytest.raises(ConfigError, match="method 'hqq' is unknown; use 'rtn', 'gptq' or 'awq'"):
        quantize_layers(loaded, (), method="hqq", grid=GRID)
    with pytest.raises(ConfigError, match="group size 100 is read by no server"):
        quantize_layers(loaded, (), method="rtn", grid=Grid(group_size=100))
    with pytest.raises(InvalidLayerError, match="layer 2 does not exist"):
        quantize_layers(loaded, [2], method="rtn", grid=GRID)
