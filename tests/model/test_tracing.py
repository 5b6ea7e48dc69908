"""Fusion groups and folds of architectures without a record, against what their whole models compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model import tracing
from quant_fairness_plugin.model.architectures import Fold, FusionGroup
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.model.tracing import trace_blocks
from quant_fairness_plugin.model.tracing.folds import is_proved
from quant_fairness_plugin.model.tracing.steering import STEERS
from quant_fairness_plugin.model.tracing.trial import Trial
from tests.traced import CONFIGS, traced_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own code warns
IDS = torch.arange(3, 33).reshape(2, 15)
PRE, POST, UP = "input_layernorm", "post_attention_layernorm", "mlp.up_proj"
VALUES = "self_attn.v_proj"
GEMMA4 = {
    "qkv": PRE, "o": "", "gate_up": "pre_feedforward_layernorm", "down": UP, "per_layer_input_gate": "",
    "per_layer_projection": "",
}  # fmt: skip
LATENT = {"self_attn.q_b_proj": "self_attn.q_a_layernorm", "self_attn.kv_b_proj": "self_attn.kv_a_layernorm"}
CONV = {"gate_up": "ffn_norm", "down": "feed_forward.w3"}
UNITS: dict[str, dict[int, dict[str, str]]] = {
    # layer → unit → the module that its scale is folded into; empty for none
    "granite": {0: {"qkv": PRE, "o": VALUES, "gate_up": POST, "down": UP}},
    "phi3": {0: {"qkv": PRE, "o": "", "gate_up": POST, "down": ""}},
    "cohere2": {0: {"qkv": PRE, "o": VALUES, "gate_up": "", "down": UP}},
    "gemma2": {0: {"qkv": PRE, "o": VALUES, "gate_up": "pre_feedforward_layernorm", "down": UP}},
    "olmo2": {0: {"qkv": "", "o": VALUES, "gate_up": "", "down": UP}},
    "falcon": {0: {"qkv": PRE, "o": "", "fc_in": "", "fc_out": ""}},
    "gpt_bigcode": {0: {"qkv": "ln_1", "o": "", "fc_in": "ln_2", "fc_out": ""}},
    "minicpm3": {0: {"qkv_a": PRE, **LATENT, "o": "", "gate_up": POST, "down": UP}},
    "nemotron": {0: {"qkv": PRE, "o": VALUES, "fc_in": POST, "fc_out": ""}},
    "xglm": {0: {"qkv": "self_attn_layer_norm", "o": VALUES, "fc_in": "final_layer_norm", "fc_out": ""}},
    "lfm2": {
        0: {"conv.in_proj": "operator_norm", "o": "", **CONV},
        1: {"qkv": "operator_norm", "o": VALUES, **CONV},
    },
    "qwen3_5_text": {
        0: {"qkvz": PRE, "o": "linear_attn.norm", "gate_up": POST, "down": UP},
        3: {"qkv": PRE, "o": VALUES, "gate_up": POST, "down": UP},
    },
    "gemma4_text": {0: GEMMA4, 4: GEMMA4},
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, Family]:
    model = traced_model(request.param)
    return request.param, model, detect_family(model)


def test_units_and_folds_are_those_that_one_reads_off_the_code(case: tuple[str, PreTrainedModel, Family]) -> None:
    name, _, family = case
    assert not family.generic
    for layer, expected in UNITS[name].items():
        sources = {fold.unit: fold.source for fold in family.kind_of(layer).folds}
        assert {unit.name: sources.get(unit.name, "") for unit in family.units_of(layer)} == expected


def test_every_linear_module_is_in_one_unit_or_kept(case: tuple[str, PreTrainedModel, Family]) -> None:
    _, model, family = case
    for layer, block in enumerate(blocks(model, family)):
        kept = [name for name, _ in family.kind_of(layer).kept]
        listed = [*family.modules(layer), *kept]
        assert sorted(listed) == sorted(name for name, module in block.named_modules() if is_linear(module))


def test_a_unit_is_what_reads_the_same_numbers_in_one_parent(case: tuple[str, PreTrainedModel, Family]) -> None:
    """By values, in the whole model; tracing compares which tensor it is, in a small one."""
    _, model, family = case
    seen = inputs(model, family)
    for layer in range(len(blocks(model, family))):
        for unit in family.units_of(layer):
            first = seen[layer, unit.modules[0]]
            parent = unit.modules[0].rpartition(".")[0]
            same = {
                name
                for (other, name), value in seen.items()
                if other == layer and name.rpartition(".")[0] == parent
                if value.shape == first.shape and torch.equal(value, first)
            }
            kept = {name for name, _ in family.kind_of(layer).kept}
            assert set(unit.modules) == same - kept


def test_what_is_folded_leaves_the_whole_model_as_it_is(case: tuple[str, PreTrainedModel, Family]) -> None:
    """All folds of all layers at once, with a scale each, by arithmetic on whole columns and rows."""
    name, model, family = case
    model = model if name == "xglm" else model.double()  # its code takes float32 only
    before = logits(model)
    count = 0
    with torch.random.fork_rng(), restored(model):
        torch.manual_seed(3)
        for layer, block in enumerate(blocks(model, family)):
            units = {unit.name: unit for unit in family.units_of(layer)}
            for fold in family.kind_of(layer).folds:
                readers = [block.get_submodule(name) for name in units[fold.unit].modules]
                source = block.get_submodule(fold.source)
                rows = len(source.weight)  # type: ignore[arg-type]
                scale = torch.rand(rows, dtype=model.dtype) + 0.5
                readers += [block.get_submodule(name) for name in fold.also]
                for reader in readers:
                    reader.weight.data = reader.weight.data @ by_reader(scale, reader, fold.heads).diag()
                divide(source, scale, fold.offset)
                count += 1
        after = logits(model)
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))  # norms compute in float32
    assert count or not any(kind.folds for kind in family.kinds)
    model.float()


def test_merged_names_are_those_of_servers() -> None:
    expected = {
        "cohere2": {"self_attn.qkv_proj": ["q", "k", "v"], "mlp.gate_up_proj": ["gate", "up"]},
        "minicpm3": {"self_attn.fused_qkv_a_proj": ["q_a", "kv_a_proj_with_mqa"], "mlp.gate_up_proj": ["gate", "up"]},
        "phi3": {},  # merged on disk already
        "falcon": {},
    }
    for name, merged in expected.items():
        found = detect_family(traced_model(name)).fused_modules(1)
        prefix = "transformer.h.1." if name == "falcon" else "model.layers.1."
        parts = {key: [part.rpartition(".")[2].removesuffix("_proj") for part in value] for key, value in found.items()}
        assert parts == {prefix + key: value for key, value in merged.items()}


def test_layers_of_a_hybrid_differ_and_what_steers_its_state_stays_in_16_bit() -> None:
    family = detect_family(traced_model("qwen3_5_text"))
    assert [family.units_of(layer)[0].name for layer in range(4)] == ["qkvz", "qkvz", "qkvz", "qkv"]
    assert family.unit_names == ("qkvz", "o", "gate_up", "down", "qkv")
    prefix = "model.layers.2.linear_attn"
    assert family.kept(2) == {f"{prefix}.in_proj_a": STEERS, f"{prefix}.in_proj_b": STEERS}
    assert family.kept(3) == {}


def test_layers_that_take_keys_from_others_have_queries_only() -> None:
    family = detect_family(traced_model("gemma4_text"))
    assert family.units_of(3)[0].modules == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert family.units_of(4)[0].modules == ("self_attn.q_proj",)
    assert next(iter(family.fused_modules(4))) == "model.layers.4.self_attn.qkv_proj"


@pytest.mark.parametrize("model_type", ["olmo2", "cohere2", "gemma3_text"])
def test_a_model_of_full_size_is_traced_by_a_narrow_one(model_type: str) -> None:
    """Without its weights. Gates of SiLU are no fold: far from zero they would pass for one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
    before = torch.get_rng_state()
    family = detect_family(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert family.unit_names == ("qkv", "o", "gate_up", "down")
    assert {fold.unit: fold.source for fold in family.kind_of(0).folds}["down"] == "mlp.up_proj"
    assert len(family.kinds) == model.config.num_hidden_layers > 20


def test_what_cannot_be_run_is_said_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced_model("olmo2", layers=3)
    monkeypatch.setattr(tracing, "_traced", {})
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(UnsupportedModelError, match=r"cannot be traced: a small .* \(ZeroDivisionError: division by z"):
        trace_blocks(model, "model.layers")
    assert detect_family(model).generic


def test_what_counts_for_nothing_proves_nothing() -> None:
    """A scale behind weights of zero leaves every logit, whatever the module in front is divided by."""
    trial = Trial(traced_model("olmo2").double(), "model.layers")
    down, fold = FusionGroup("down", ("mlp.down_proj",), None), Fold("down", "mlp.gate_proj")
    assert not is_proved(trial, [0], down, fold)  # SiLU lies between
    trial.blocks[0].get_submodule("post_feedforward_layernorm").weight.data.zero_()  # type: ignore[union-attr,operator]
    trial.logits = trial.run()
    assert not is_proved(trial, [0], down, fold)


def blocks(model: PreTrainedModel, family: Family) -> list[nn.Module]:
    return list(model.get_submodule(family.blocks))  # type: ignore[arg-type]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def inputs(model: PreTrainedModel, family: Family) -> dict[tuple[int, str], Tensor]:
    """Layer and module → what the module reads."""
    seen: dict[tuple[int, str], Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, key=(layer, name): seen.__setitem__(key, given[0].clone()))
        for layer, block in enumerate(blocks(model, family))
        for name, module in block.named_modules()
        if is_linear(module)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


def divide(source: nn.Module, scale: Tensor, offset: float) -> None:
    rows = scale.reciprocal().diag() @ source.weight.data if is_linear(source) else None  # type: ignore[operator]
    source.weight.data = (source.weight.data + offset) / scale - offset if rows is None else rows  # type: ignore[union-attr,operator]
    if getattr(source, "bias", None) is not None:
        source.bias.data = source.bias.data / scale  # type: ignore[union-attr]


def by_reader(scale: Tensor, reader: nn.Module, heads: int) -> Tensor:
    """The scale of each input channel, one by one: channels of head h read head h // (heads that share one)."""
    columns = linear_weight(reader).shape[1]
    if not heads:
        return scale
    width = len(scale) // heads
    shared = columns // len(scale)
    return torch.stack([scale[(c // width) // shared * width + c % width] for c in range(columns)])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    yield
    for name, parameter in model.named_parameters():
        parameter.data = values[name]
