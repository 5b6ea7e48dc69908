from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import ARCHITECTURES
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel, from_loaded
from quant_fairness_plugin.quantize.folding import fold_source, model_folds
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from tests.tiny import FAMILIES, byte_tokenizer, tiny_config

Load = Callable[..., LoadedModel]

GATED = {"qkv", "gate_up", "down"}
EXPECTED = {
    # llama, mistral, qwen and gemma are built with grouped kv heads: nothing can go from o into v
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), GATED),
    "opt": {"qkv", "o", "fc_in", "fc_out"},
    **dict.fromkeys(("gpt_neox", "gpt2", "bloom"), {"qkv", "fc_in"}),
}


def in_memory(config: PretrainedConfig) -> LoadedModel:
    """A random model with weights that are 16-bit numbers."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    return from_loaded(model, byte_tokenizer())


def changed(family: str, **fields: object) -> LoadedModel:
    config = tiny_config(family, layers=2, width=32)
    for name, value in fields.items():
        setattr(config, name, value)
    return in_memory(config)


@torch.no_grad()
def logits(loaded: LoadedModel) -> Tensor:
    found: Tensor = loaded.model(torch.arange(1, 41).unsqueeze(0)).logits
    return found


@torch.no_grad()
def fold_away(
    loaded: LoadedModel, unit: str, scale: Tensor, tensors: Mapping[str, QuantizedTensor], *, asked: bool = False
) -> None:
    """Fold a scale in front of a unit of layer 1 and multiply its weights by what was really folded."""
    source = fold_source(loaded, 1, model_folds(loaded)[unit], tensors)
    effective = scale if asked else source.effective(scale)
    source.fold(scale)
    [modules] = [found.modules for found in loaded.family.units if found.name == unit]
    for module in (loaded.block(1).get_submodule(name) for name in modules):
        set_linear_weight(module, linear_weight(module) * effective)


def width_of(loaded: LoadedModel, unit: str) -> int:
    [modules] = [found.modules for found in loaded.family.units if found.name == unit]
    return linear_weight(loaded.block(1).get_submodule(modules[0])).shape[1]


def random_scale(columns: int) -> Tensor:
    """Between 1/8 and 8, no powers of two."""
    return 8 ** (2 * torch.rand(columns, generator=torch.Generator().manual_seed(1)) - 1)


def relative_change(changed_logits: Tensor, original: Tensor) -> float:
    return float((changed_logits - original).norm() / original.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_folds_where_that_is_exact(load: Load, family: str) -> None:
    assert set(model_folds(load(family))) == EXPECTED[family]
    assert {name for record in ARCHITECTURES if record.folds for name in record.families} == set(FAMILIES)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_without_grouped_kv_heads_v_takes_the_scale_of_o(family: str) -> None:
    loaded = changed(family, num_key_value_heads=4)
    assert set(model_folds(loaded)) == GATED | {"o"}
    original = logits(loaded)
    fold_away(loaded, "o", random_scale(32), {})
    assert 0 < relative_change(logits(loaded), original) < 2**-10


@pytest.mark.parametrize(
    ("family", "unit"), [(family, unit) for family in FAMILIES for unit in sorted(EXPECTED[family])]
)
def test_a_fold_leaves_the_output_as_it_was(load: Load, family: str, unit: str) -> None:
    loaded = load(family)
    original, scale = logits(loaded), random_scale(width_of(loaded, unit))
    fold_away(loaded, unit, scale, {})
    # A norm is a vector, so what its rounding took is given back: float32 arithmetic is all that is left, but for the
    # bias of a LayerNorm, which like a linear module's weights is rounded to float16: half of 2^-10 each at most.
    norm_without_bias = family in {"llama", "mistral", "qwen2", "qwen3", "gemma"} and unit != "down"
    assert relative_change(logits(loaded), original) < (1e-5 if norm_without_bias else 2**-10)


@pytest.mark.parametrize(
    ("family", "unit"), [("llama", "qkv"), ("gemma", "gate_up"), ("llama", "down"), ("opt", "fc_out")]
)
def test_powers_of_two_are_folded_without_any_rounding(load: Load, family: str, unit: str) -> None:
    loaded = load(family)
    original = logits(loaded)
    fold_away(loaded, unit, 2.0 ** torch.randint(-1, 2, (width_of(loaded, unit),)), {})
    # Gemma stores w with 1 + w in use, so halving 1 + w rounds w, which the effective scale makes up for.
    assert relative_change(logits(loaded), original) < 1e-5


def test_the_scale_that_was_asked_for_would_not_be_exact(load: Load) -> None:
    loaded = load("llama")
    original = logits(loaded)
    fold_away(loaded, "qkv", random_scale(32), {}, asked=True)
    assert relative_change(logits(loaded), original) > 1e-5


@pytest.mark.parametrize(("family", "source"), [("llama", "mlp.up_proj"), ("opt", "self_attn.v_proj"), ("opt", "fc1")])
def test_a_quantized_source_keeps_its_integers(load: Load, family: str, source: str) -> None:
    loaded = load(family)
    [fold] = [fold for fold in model_folds(loaded).values() if fold.source == source]
    name = f"{loaded.family.blocks}.1.{source}"
    module = loaded.linears(1)[name]
    before = quantize_rtn(linear_weight(module), Grid(group_size=32), scale_dtype=torch.float16)
    set_linear_weight(module, before.dequantize())
    bias = None if module.bias is None else module.bias.detach().clone()
    original, scale = logits(loaded), random_scale(len(linear_weight(module)))
    fold_away(loaded, fold.unit, scale, {name: before})
    assert relative_change(logits(loaded), original) < 2**-10
    with torch.no_grad():
        folded = fold_source(loaded, 1, fold, {name: before}).fold(scale)
    assert folded.tensor is not None
    assert torch.equal(folded.tensor.integers, before.integers)
    assert torch.equal(folded.tensor.zeros, before.zeros)
    torch.testing.assert_close(
        folded.tensor.scales.float() * scale.unsqueeze(1), before.scales.float(), rtol=2**-10, atol=0
    )
    assert set(folded.parameters) == (set() if bias is None else {f"{name}.bias"})


def test_what_is_folded_is_16_bit_and_in_the_model(load: Load) -> None:
    for family in ("gemma", "opt", "gpt2"):
        loaded = load(family)
        own = dict(loaded.model.named_parameters())
        for unit, fold in model_folds(loaded).items():
            before = {name: value.detach().clone() for name, value in own.items()}
            with torch.no_grad():
                folded = fold_source(loaded, 1, fold, {}).fold(random_scale(width_of(loaded, unit)))
            assert folded.tensor is None
            for name, value in folded.parameters.items():
                assert torch.equal(value, value.half().float())
                assert torch.equal(value, own[name])
                assert not torch.equal(value, before[name])
            assert {n for n, v in own.items() if not torch.equal(v, before[n])} == set(folded.parameters)


def test_channels_that_16_bit_cannot_hold_stay_as_they_are(load: Load) -> None:
    loaded = load("opt")
    norm = loaded.block(1).get_submodule("self_attn_layer_norm")
    assert isinstance(norm.weight, torch.nn.Parameter)
    with torch.no_grad():
        norm.weight[:3] = torch.tensor([0.0, 60000.0, 6e-8])
    scale = torch.full((32,), 2.0)
    scale[1], scale[2] = 0.5, 100.0  # would overflow, would become 0
    original = logits(loaded)
    source = fold_source(loaded, 1, model_folds(loaded)["qkv"], {})
    effective = source.effective(scale)
    assert effective[:3].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(effective[3:], scale[3:])
    fold_away(loaded, "qkv", scale, {})
    assert relative_change(logits(loaded), original) < 1e-5
    assert norm.weight[:3].tolist() == [0.0, 60000.0, pytest.approx(6e-8, rel=0.01)]


def test_a_row_below_what_16_bit_resolves_is_not_divided(load: Load) -> None:
    loaded = load("llama")
    up = loaded.linears(1)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        linear_weight(up)[0] *= 2.0**-12
        linear_weight(up)[1] = 0
    set_linear_weight(up, linear_weight(up).half().float())
    effective = fold_source(loaded, 1, model_folds(loaded)["down"], {}).effective(torch.full((64,), 30.0))
    assert effective[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(effective[2:], torch.full((62,), 30.0), rtol=2**-10, atol=0)


def test_models_that_compute_something_else_are_not_folded() -> None:
    assert set(model_folds(changed("opt", do_layer_norm_before=False))) == {"o", "fc_out"}
    assert set(model_folds(changed("opt", activation_function="gelu"))) == {"qkv", "o", "fc_in"}
    assert set(model_folds(changed("gpt2", activation_function="relu"))) == {"qkv", "fc_in", "fc_out"}
    assert set(model_folds(changed("gpt_neox", hidden_act="relu"))) == {"qkv", "fc_in", "fc_out"}
    assert model_folds(changed("bloom", apply_residual_connection_post_layernorm=True)) == {}


@pytest.mark.parametrize(("family", "unit"), [("gpt2", "fc_out"), ("gpt_neox", "fc_out")])
def test_relu_lets_the_scale_of_the_second_layer_through(family: str, unit: str) -> None:
    activation = "activation_function" if family == "gpt2" else "hidden_act"
    loaded = changed(family, **{activation: "relu"})
    original = logits(loaded)
    fold_away(loaded, unit, random_scale(width_of(loaded, unit)), {})
    assert relative_change(logits(loaded), original) < 2**-10


def test_unknown_architectures_are_refused_with_those_that_work(load: Load, tmp_path: Path) -> None:
    loaded = load("llama")
    loaded.model.config.model_type = "granite"
    try:
        with pytest.raises(
            UnsupportedModelError, match="granite: it is not known .* bloom, gemma, gpt2.*'gptq' or 'rtn'"
        ):
            model_folds(loaded)
    finally:
        del loaded.model.config.model_type
