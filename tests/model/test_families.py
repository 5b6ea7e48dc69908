from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import known_families
from quant_fairness_plugin.model.families import detect_family
from tests.tiny import FAMILIES, tiny_config

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def build(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def tiny(family: str, *, layers: int = 2) -> PreTrainedModel:
    return build(tiny_config(family, layers=layers, width=32))


def test_every_known_family_has_a_tiny_model() -> None:
    assert sorted(known_families()) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised(family: str) -> None:
    found = detect_family(tiny(family))
    assert found.name == family
    assert not found.generic


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_module_of_every_block_is_covered_exactly_once(family: str) -> None:
    model = tiny(family, layers=3)
    found = detect_family(model)
    mapped = [name for layer in range(3) for name in found.full_names(layer)]
    naive = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and f"{found.blocks}." in n]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) == set(naive)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_follow_the_order_of_the_computation(family: str) -> None:
    units = [unit.name for unit in detect_family(tiny(family)).units]
    assert units in (["qkv", "o", "gate_up", "down"], ["qkv", "o", "fc_in", "fc_out"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_of_the_model_is_where_the_map_says(family: str) -> None:
    model = tiny(family)
    found = detect_family(model)
    assert len(model.get_submodule(found.blocks)) == 2  # type: ignore[arg-type]
    assert model.get_submodule(found.head) is model.get_output_embeddings()
    assert model.get_submodule(found.embeddings[0]) is model.get_input_embeddings()
    assert all(isinstance(model.get_submodule(name), nn.Embedding) for name in found.embeddings)
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)} == set(found.embeddings)
    assert found.final_norm is not None
    assert model.get_submodule(found.final_norm).weight.shape == (32,)
    assert found.tied_head == model.config.tie_word_embeddings
    assert found.conv1d == (family == "gpt2")


def test_layer_1_of_12_does_not_take_10_and_11_with_it() -> None:
    found = detect_family(tiny("llama", layers=12))
    assert found.full_names(1) == tuple(
        f"model.layers.1.{name}"
        for name in (*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    )
    assert tuple(found.fused_modules(1)) == ("model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj")
    assert not set(found.full_names(1)) & set(found.full_names(11))


@pytest.mark.parametrize(("family", "fused"), [("opt", 1), ("gpt2", 0), ("gpt_neox", 0), ("bloom", 0), ("qwen3", 2)])
def test_fused_names_are_only_those_that_servers_merge(family: str, fused: int) -> None:
    found = detect_family(tiny(family))
    assert len(found.fused_modules(0)) == fused
    assert not found.fused_modules(0).keys() & set(found.full_names(0))


def test_structure_decides_and_the_model_type_only_picks_among_equals() -> None:
    model = tiny("llama")
    for model_type, expected in {
        "mistral": "mistral",
        "qwen3": "llama",
        "gpt2": "llama",
        "never-seen": "llama",
    }.items():
        model.config.model_type = model_type
        assert detect_family(model).name == expected
    assert detect_family(build(LlamaConfig(**SMALL, attention_bias=True))).name == "llama"


def test_tying_is_read_from_the_model_not_from_its_config() -> None:
    model = tiny("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert detect_family(model).tied_head


def test_opt_350m_shape_has_projections_and_no_final_norm() -> None:
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        do_layer_norm_before=False,
    )
    found = detect_family(build(config))
    assert (found.name, found.final_norm) == ("opt", None)
    assert not any("project" in name for name in found.modules(0))


def test_equal_blocks_that_cannot_be_traced_get_a_generic_map() -> None:
    found = detect_family(hand_made())  # type: ignore[arg-type] # it has no config to build a small one by
    assert found.generic
    assert [unit.modules for unit in found.units_of(1)] == [("mlp.0",), ("mlp.1",)]
    assert found.fused_modules(0) == {}
    assert (found.embeddings, found.kinds) == (("embed",), ())


def test_a_single_block_or_blocks_that_differ_need_to_be_traced() -> None:
    single, uneven = hand_made(), hand_made()
    single.layers = single.layers[:1]  # type: ignore[index]
    with pytest.raises(UnsupportedModelError, match="an unknown architecture with a single block, and it has no conf"):
        detect_family(single)  # type: ignore[arg-type]
    uneven.layers[1].more = nn.Linear(32, 32)  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedModelError, match=r"blocks 0 and 1 of layers hold different modules, and it has no"):
        detect_family(uneven)  # type: ignore[arg-type]
    assert detect_family(build(Gemma2Config(**(SMALL | {"num_hidden_layers": 1}), head_dim=8))).name == "gemma2"


DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 0}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # model type → the experts' module of the first block that has them, and the config
    "qwen3_next": ("model.layers.0.mlp.experts", SMALL | {"num_experts": 4, "moe_intermediate_size": 16}),
    "deepseek_v2": ("model.layers.0.mlp.experts", SMALL | DEEPSEEK | ROUTED | {"n_group": 1, "topk_group": 1}),
    "phimoe": ("model.layers.0.mlp.experts", SMALL | {"num_local_experts": 2}),
    "gpt_oss": ("model.layers.0.mlp.experts", SMALL | {"num_local_experts": 2, "head_dim": 8}),
    "jetmoe": ("model.layers.0.self_attention.experts", SMALL | {"num_local_experts": 2}),
    "granitemoe": ("model.layers.0.block_sparse_moe", SMALL | {"num_local_experts": 2}),
    "jamba": ("model.layers.1.feed_forward.experts", SMALL | {"num_experts": 4}),
    "doge": ("model.layers.0.mlp", SMALL | {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_refused_by_name(model_type: str) -> None:
    where, config = MIXTURES[model_type]
    message = rf"^{model_type}: {re.escape(where)}[a-z_.]* holds a mixture of experts.*Use a dense model.*gptqmodel"
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        detect_family(build(AutoConfig.for_model(model_type, **config)))
    assert caught.value.exit_code == 3


def plain_block(**extra: nn.Module) -> nn.Module:
    block = nn.Module()
    block.mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    for name, module in extra.items():
        block.add_module(name, module)
    return block


def hand_made(**extra: nn.Module) -> nn.Module:
    """A model of an unknown architecture with two equal blocks and a head."""
    model = nn.Module()
    model.embed = nn.Embedding(64, 32)
    model.layers = nn.ModuleList([plain_block(**copy.deepcopy(extra)) for _ in range(2)])
    model.head = nn.Linear(32, 64)
    model.get_output_embeddings = lambda: model.head  # type: ignore[assignment]
    model.get_input_embeddings = lambda: model.embed  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"gate": nn.Linear(32, 4)}, "gate"),  # a router and one shared MLP look dense otherwise
        ({"router": nn.Linear(32, 4)}, "router"),
        ({"shared_expert_gate": nn.Linear(32, 1)}, "shared_expert_gate"),
    ],
)
def test_experts_that_hide_in_an_otherwise_dense_block_are_refused(extra: dict[str, nn.Module], where: str) -> None:
    assert detect_family(hand_made()).generic  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.{where} holds a mixture of experts"):
        detect_family(hand_made(**extra))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"branches": nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])}, "branches is a list of several modules"),
        ({"keys": nn.Embedding(16, 32)}, "keys is a table that tokens look rows up in"),
        (
            {"bank": nn.ParameterList([nn.Parameter(torch.zeros(2, 4, 4))])},
            "bank stacks several matrices in one tensor",
        ),
    ],
)
def test_what_no_dense_block_holds_is_refused_for_what_it_is(extra: dict[str, nn.Module], reason: str) -> None:
    """Experts, perhaps; where neither a name nor the config says so, the reason is what is there."""
    with pytest.raises(UnsupportedModelError, match=rf"layers\.0\.{reason}") as caught:
        detect_family(hand_made(**extra))  # type: ignore[arg-type]
    assert "mixture of experts" not in str(caught.value)
    model = hand_made(**extra)
    model.config = Qwen2MoeConfig(**SMALL, num_experts=4)  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match=r"holds a mixture of experts"):
        detect_family(model)  # type: ignore[arg-type]


def test_experts_in_a_later_block_only_are_refused_too() -> None:
    config = Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1.* holds a mixture of experts"):
        detect_family(build(config))


def test_blocks_that_differ_are_refused() -> None:
    model = tiny("llama", layers=3)
    model.model.layers[2].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"blocks 0 and 2 of model\.layers hold different modules"):
        detect_family(model)


def test_blocks_that_share_weights_are_refused() -> None:
    model = tiny("llama", layers=3)
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match=r"blocks of model\.layers share weights"):
        detect_family(model)


def test_one_weight_shared_between_blocks_is_refused() -> None:
    model = tiny("llama", layers=3)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"blocks of model\.layers share weights"):
        detect_family(model)


def test_an_unmerged_adapter_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[0].self_attn.q_proj.lora_A = nn.Linear(32, 4, device="meta")
    with pytest.raises(UnsupportedModelError, match="unmerged LoRA adapter.*merge_and_unload"):
        detect_family(model)


def test_an_encoder_is_refused() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=True
    )
    with torch.device("meta"):
        model = BertLMHeadModel(config)
    with pytest.raises(UnsupportedModelError, match=r"blocks at bert\.encoder\.layer are an encoder's"):
        detect_family(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"several lists of blocks \(encoder\.block, decoder\.block\)"):
        detect_family(model)


def test_a_model_without_a_head_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(**SMALL))
    wrapped = nn.Module()
    wrapped.model = model
    wrapped.get_output_embeddings = model.get_output_embeddings  # type: ignore[assignment]
    with pytest.raises(UnsupportedModelError, match="no output head; expected a causal language model"):
        detect_family(wrapped)  # type: ignore[arg-type]


def test_a_model_without_blocks_names_what_was_looked_for() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear: no list of blocks.*Expected.*as in bloom, gemma, gpt2"):
        detect_family(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_known_blocks_with_other_embeddings_are_refused() -> None:
    model = tiny("gpt2")
    del model.transformer.wpe
    with pytest.raises(UnsupportedModelError, match=r"blocks are those of gpt2, but transformer\.wpe is missing"):
        detect_family(model)
