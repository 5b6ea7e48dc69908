"""AWQ as `quantize_model` runs it: the search in `test_awq`, the folds in `test_folding`, the rest in `test_stream`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import is_linear, linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.awq import solve_awq
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from tests.planning import quantize_layers
from tests.quantize.test_stream import assert_untouched, fair_hessian, own_inputs, state
from tests.tiny import FAMILIES

Load = Callable[..., LoadedModel]
ASYMMETRIC = Grid(bits=4, group_size=32, symmetric=False)


@torch.no_grad()
def make_loud(loaded: LoadedModel) -> None:
    """Let every norm in the blocks amplify each eighth channel 8 times: AWQ has something to scale."""
    for layer in range(loaded.layers):
        for fold in loaded.family.architecture.folds:
            name = f"{loaded.family.blocks}.{layer}.{fold.source}"
            if not is_linear(loaded.model.get_submodule(name)):
                loaded.model.get_parameter(f"{name}.weight")[::8] = 8.0 - fold.offset


@torch.no_grad()
def logits(loaded: LoadedModel, rows: CalibrationSet, weights: dict[str, Tensor]) -> Tensor:
    with swapped(loaded, weights):
        found = [loaded.model(torch.tensor([row])).logits[0] for part in rows.rows.values() for row in part]
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_quantizes_every_family_and_leaves_the_model_as_it_was(
    load: Load, rows: CalibrationSet, family: str
) -> None:
    loaded = load(family)
    make_loud(loaded)
    before = state(loaded)
    quantized = quantize_layers(loaded, [0], method="awq", grid=ASYMMETRIC, calibration=rows)
    assert_untouched(loaded, before)
    assert set(quantized.tensors) == set(loaded.family.full_names(1))
    assert quantized.losses.keys() == quantized.tensors.keys()
    assert all(0 < loss < 0.1 for loss in quantized.losses.values())
    assert quantized.damping == {}
    # One folded norm per fold, none of them in the protected layer.
    assert quantized.folded
    assert all(name.startswith(f"{loaded.family.blocks}.1.") for name in quantized.folded)
    for name, value in quantized.folded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, value.half().float())
        assert value.shape == before[name].shape
    original = logits(loaded, rows, {})
    change = (logits(loaded, rows, quantized.dense_weights()) - original).norm() / original.norm()
    half = logits(loaded, rows, {n: w for n, w in quantized.dense_weights().items() if n not in quantized.folded})
    assert change < 0.4  # 4 bits in one of two layers, random weights
    assert (half - original).norm() > 1.5 * change * original.norm()  # the integers alone are of another model


def awq_naively(loaded: LoadedModel, rows: CalibrationSet, layer: int) -> dict[str, Tensor]:
    """AWQ of a layer by whole forward passes of a copy of the model, without `stream`: dense weights by module.

    Nothing is folded: every module's weight is Q(W s) / s, which is what the folded model computes. Only s is the
    quotient of what is stored in 16 bit: norm weights, or the scales of up's rows (one group each).
    """
    dense: dict[str, Tensor] = {}
    block = f"{loaded.family.blocks}.{layer}"
    lead = {
        unit: loaded.model.get_parameter(f"{block}.{norm}.weight").detach()
        for unit, norm in (("qkv", "input_layernorm"), ("gate_up", "post_attention_layernorm"))
    }
    for unit in loaded.family.units:
        modules = {name: loaded.block(layer).get_submodule(name) for name in unit.modules}
        first = next(iter(modules.values()))
        inputs = {language: own_inputs(loaded, first, found) for language, found in rows.rows.items()}
        weights = {name: linear_weight(module).clone() for name, module in modules.items()}
        magnitude = sum(rows.shares[language] * x.abs().mean(0) / x.abs().mean() for language, x in inputs.items())
        assert isinstance(magnitude, Tensor)
        results, scale = solve_awq(
            weights,
            {name: fair_hessian(weight, inputs, rows.shares) for name, weight in weights.items()},
            magnitude.float(),
            dict.fromkeys(weights, ASYMMETRIC),
            scale_dtype=torch.float16,
            effective=None if unit.name == "o" else partial(quotient, lead[unit.name]),
            clipped=tuple(name for name in weights if name[-6:] not in {"q_proj", "k_proj"}),
        )
        for name, module in modules.items():
            dense[name] = results[name].tensor.dequantize() / scale
            set_linear_weight(module, dense[name])
        if unit.name == "gate_up":
            lead["down"] = results["mlp.up_proj"].tensor.scales.float().squeeze(1)
    return dense


def quotient(lead: Tensor, scale: Tensor) -> Tensor:
    return lead / (lead / scale).half().float()


def test_awq_computes_what_a_search_on_whole_forward_passes_finds(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama", layers=3)
    ours = logits(
        loaded, rows, quantize_layers(loaded, [0, 2], method="awq", grid=ASYMMETRIC, calibration=rows).dense_weights()
    )
    original = logits(loaded, rows, {})
    awq_naively(loaded, rows, 1)
    # Batched float32 forward passes round differently, which may move a weight that lies between two integers.
    assert (ours - logits(loaded, rows, {})).norm() < 0.05 * (ours - original).norm()


def test_protected_units_of_a_quantized_layer_carry_the_folded_weights(load: Load, rows: CalibrationSet) -> None:
    loaded = load("opt")
    overrides: dict[str, Precision] = {"layers.1.qkv": "fp16", "layers.1.fc_in": "fp16"}
    quantized = quantize_layers(loaded, [0], method="awq", grid=ASYMMETRIC, calibration=rows, overrides=overrides)
    block = "model.decoder.layers.1"
    assert set(quantized.tensors) == {f"{block}.self_attn.out_proj", f"{block}.fc2"}
    assert set(quantized.folded) == {
        f"{block}.{name}.{part}" for name in ("self_attn.v_proj", "fc1") for part in ("weight", "bias")
    }
    original = logits(loaded, rows, {})
    assert (logits(loaded, rows, quantized.dense_weights()) - original).norm() < 0.1 * original.norm()


def test_awq_with_int8_units_and_on_a_symmetric_grid(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama")
    overrides: dict[str, Precision] = {"layers.0": "int8", "layers.1.down": "int8"}
    grid = Grid(bits=4, group_size=32, symmetric=True)
    quantized = quantize_layers(loaded, (), method="awq", grid=grid, calibration=rows, overrides=overrides)
    bits = {name: tensor.grid.bits for name, tensor in quantized.tensors.items()}
    assert {name for name, found in bits.items() if found == 8} == {
        *loaded.family.full_names(0),
        "model.layers.1.mlp.down_proj",
    }
    assert all(tensor.grid.symmetric for tensor in quantized.tensors.values())
    losses = quantized.losses
    assert losses["model.layers.0.mlp.down_proj"] < 0.02 * losses["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt2"])
def test_awq_beats_rounding_where_a_few_channels_are_loud(load: Load, rows: CalibrationSet, family: str) -> None:
    loaded = load(family, width=64)
    make_loud(loaded)
    original = logits(loaded, rows, {})
    found = quantize_layers(loaded, (), method="awq", grid=ASYMMETRIC, calibration=rows)
    rounded = quantize_layers(loaded, (), method="rtn", grid=ASYMMETRIC)
    error, plain = ((logits(loaded, rows, q.dense_weights()) - original).norm() for q in (found, rounded))
    assert 0 < error < 0.9 * plain


def test_awq_refuses_what_it_does_not_know(load: Load, rows: CalibrationSet) -> None:
    loaded = load("llama")
    with pytest.raises(ConfigError, match="clip 'minimax' .* 'awq'"):
        quantize_layers(loaded, (), method="awq", grid=Grid(group_size=32, clip="minimax"), calibration=rows)
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.1.input_layernorm.weight").fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match=r"^model\.layers\.1\.self_attn\.q_proj: the inputs .* NaN"):
        quantize_layers(loaded, (), method="awq", grid=ASYMMETRIC, calibration=rows, strict=True)
    loaded.model.config.model_type = "granite"
    try:
        with pytest.raises(UnsupportedModelError, match="granite: it is not known where AWQ's scales can be folded"):
            quantize_layers(loaded, (), method="awq", grid=ASYMMETRIC, calibration=rows)
    finally:
        del loaded.model.config.model_type
