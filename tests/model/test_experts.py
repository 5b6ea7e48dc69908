from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant_fairness_plugin.errors import InvalidLayerError
from quant_fairness_plugin.model.architectures.experts import MIXTURES as RECORDS
from quant_fairness_plugin.model.architectures.experts import find_mixture, mixture_advice, mixture_kind
from quant_fairness_plugin.model.experts import (
    Experts,
    expert_modules,
    stacked,
    stacked_shapes,
    with_unfolded_experts,
)
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import LoadedModel, from_loaded, load_model
from quant_fairness_plugin.model.native import auto_class
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.preflight import check_units
from tests.tiny import MIXTURES, byte_tokenizer, tiny_config
from tests.tiny_mixtures import DENSE_FIRST, LATENT, SHARED

Load = Callable[..., LoadedModel]
IDS = torch.tensor([[3, 7, 250, 12, 9, 9, 41], [100, 2, 77, 31, 8, 5, 6]])


def random_model(family: str) -> PreTrainedModel:
    config = tiny_config(family, layers=2, width=40)
    model: PreTrainedModel = auto_class(config.to_dict()).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.train(False)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model(IDS, use_cache=False).logits
    return result


def test_every_family_that_is_taken_has_a_tiny_model() -> None:
    assert sorted(name for record in RECORDS for name in record.families) == sorted(MIXTURES)


@pytest.mark.parametrize("family", MIXTURES)
def test_unfolded_experts_compute_what_stacked_ones_do_and_go_back_exactly(family: str) -> None:
    model = random_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    twin = with_unfolded_experts(model)
    # Transformers adds the experts' outputs in another order.
    assert torch.allclose(logits(twin), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    for name, experts in expert_modules(twin):
        made = {f"{name}.{part}": make() for part, make in stacked(experts).items()}
        assert {key: tuple(value.shape) for key, value in made.items()} == {
            f"{name}.{part}": shape for part, shape in stacked_shapes(experts).items()
        }
        assert all(torch.equal(value, before[key]) for key, value in made.items())
    assert torch.equal(logits(model), expected)
    assert model.state_dict().keys() == before.keys()


def test_unfolded_experts_share_the_memory_of_the_stack() -> None:
    model = random_model("qwen3_moe")
    twin = with_unfolded_experts(model)
    linear = twin.get_submodule("model.layers.1.mlp.experts.2.up_proj")
    linear.weight.data.fill_(0.5)  # type: ignore[operator, union-attr]
    stack: Tensor = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    assert bool((stack[2, 40:] == 0.5).all())
    assert not bool((stack[2, :40] == 0.5).any())


def test_experts_of_a_transposed_stack_are_read_the_other_way_round() -> None:
    model = random_model("qwen3_moe")
    module: Any = model.get_submodule("model.layers.0.mlp.experts")
    module.is_transposed = True
    for name in ("gate_up_proj", "down_proj"):
        module.register_parameter(name, torch.nn.Parameter(getattr(module, name).detach().transpose(1, 2).contiguous()))
    up, down = module.gate_up_proj.detach().clone(), module.down_proj.detach().clone()
    experts = with_unfolded_experts(model).get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, Experts)
    assert torch.equal(experts.expert(3)["gate_proj"].weight, up[3, :, :40].T)
    assert torch.equal(experts.expert(3)["down_proj"].weight, down[3].T)
    made = {part: make() for part, make in stacked(experts).items()}
    assert torch.equal(made["gate_up_proj"], up)
    assert torch.equal(made["down_proj"], down)


def test_a_model_in_memory_keeps_its_stacked_experts() -> None:
    model = random_model("mixtral")
    names = set(model.state_dict())
    loaded = from_loaded(model, byte_tokenizer())
    assert loaded.model is not model
    assert "model.layers.0.mlp.experts.3.w2" in loaded.linears(0)
    assert set(model.state_dict()) == names
    dense = AutoModelForCausalLM.from_config(tiny_config("llama", layers=2, width=32))
    assert from_loaded(dense, byte_tokenizer()).model is dense


MIXERS = {
    **dict.fromkeys(LATENT, ["qkv_a", "self_attn.q_b_proj", "self_attn.kv_b_proj"]),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), ["qkvz"]),
    "qwen3_next": ["linear_attn.in_proj_qkvz"],
    "afmoe": ["qkv", "self_attn.gate_proj"],
    "laguna": ["qkv", "self_attn.g_proj"],
}
"""Units in front of the last one of attention, or of what stands in its place, where they are not `qkv` alone."""
MERGED = {
    "qkv": "self_attn.qkv_proj", "qkv_a": "self_attn.fused_qkv_a_proj", "qkvz": "linear_attn.in_proj_qkvz",
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_the_routed_experts_of_a_layer_are_one_unit(load: Load, family: str) -> None:
    found = load(family).family
    units = {unit.name: unit for unit in found.units_of(1)}
    shared = ["shared_gate_up", "shared_down"] if family in SHARED else []
    attention = MIXERS.get(family, ["qkv"])
    assert list(units) == [*attention, "o", "experts", *shared]
    assert [name for name, unit in units.items() if unit.routed] == ["experts"]
    assert len(units["experts"].modules) == 4 * 3
    assert units["experts"].fused == ("feed_forward.experts" if family == "lfm2_moe" else "mlp.experts")
    assert attention[0] not in MERGED or units[attention[0]].fused == MERGED[attention[0]]
    if shared:
        assert str(units["shared_gate_up"].fused).endswith(".gate_up_proj")
        assert not any("gate_up" in name or name.endswith("expert_gate") for name in found.modules(1))


@pytest.mark.parametrize("family", DENSE_FIRST)
def test_leading_dense_layers_have_units_of_their_own(load: Load, family: str) -> None:
    found = load(family).family
    assert [unit.name for unit in found.units_of(0)][-3:] == ["o", "gate_up", "down"]
    assert not any(unit.routed for unit in found.units_of(0))
    assert any(unit.routed for unit in found.units_of(1))


def test_names_on_disk_are_those_of_servers(load: Load) -> None:
    record = load("mixtral").family.architecture
    stored = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert record.stored_name("model.layers.0.mlp.experts.1.w3.weight") == stored
    assert record.loaded_name(stored) == "model.layers.0.mlp.experts.1.w3.weight"


@pytest.mark.parametrize(
    ("family", "loaded", "stored"),
    [
        ("phimoe", "model.layers.3.mlp.router.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("phimoe", "model.layers.3.mlp.experts.1.w2.weight", "model.layers.3.block_sparse_moe.experts.1.w2.weight"),
        ("hy_v3", "model.layers.3.mlp.gate.weight", "model.layers.3.mlp.router.gate.weight"),
        ("hy_v3", "model.layers.3.mlp.shared_experts.up_proj", "model.layers.3.mlp.shared_mlp.up_proj"),
        ("hy_v3", "model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("exaone_moe", "1.mlp.gate.e_score_correction_bias", "1.mlp.e_score_correction_bias"),
        ("exaone_moe", "1.mlp.gate.weight", "1.mlp.gate.weight"),
        ("qwen3_moe", "1.mlp.gate.weight", "1.mlp.gate.weight"),
    ],
)
def test_names_change_by_whole_parts_and_back(family: str, loaded: str, stored: str) -> None:
    mixture = find_mixture(family)
    assert mixture is not None
    assert mixture.stored_name(loaded) == stored
    assert mixture.loaded_name(stored) == loaded
    assert mixture.loaded_name(loaded) == loaded


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("deepseek_v32", {"self_attn.indexer.wq_b", "self_attn.indexer.wk", "self_attn.indexer.weights_proj"}),
        ("qwen3_next", {"linear_attn.in_proj_ba"}),
        ("qwen3_5_moe", {"linear_attn.in_proj_a", "linear_attn.in_proj_b"}),
        ("hunyuan_v1_moe", set()),  # its router holds a linear module, mlp.gate.wg
        ("afmoe", set()),  # and so does this one's, mlp.router.gate
    ],
)
def test_what_chooses_tokens_or_steers_a_state_keeps_16_bit(load: Load, family: str, kept: set[str]) -> None:
    found = load(family).family
    assert set(dict(found.kind_of(1).kept)) == kept
    names = set(found.modules(1))
    assert not names & kept
    assert not any(part in ("gate", "router", "indexer") for name in names for part in name.split("."))


def test_what_writes_the_output_of_a_module_comes_last_of_it() -> None:
    held = ["mix.out_proj", "mix.in_proj_z", "mix.in_proj_qkv", "ff.experts.0.w1", "ff.shared.w2", "ff.shared.w1"]
    kind = mixture_kind([*held, "ff.shared.w3"], "ff.experts")
    assert [unit.name for unit in kind.units] == ["qkvz", "o", "experts", "shared_gate_up", "shared_down"]


@pytest.mark.parametrize("family", ["qwen3_5_moe", "mixtral"])
def test_files_that_stack_experts_are_read_as_those_that_do_not(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Qwen3.5 is published both ways. Transformers loads either; whole or in blocks, the values are the same."""
    single, stacks = tiny_model(family), tmp_path / "stacked"
    shutil.copytree(single, stacks)
    model = load_model(str(single)).model
    tensors = {k: v for k, v in load_file(single / "model.safetensors").items() if ".experts." not in k}
    for name, experts in expert_modules(model):
        made = {f"{name}.{part}": make().half().contiguous() for part, make in stacked(experts).items()}
        tensors |= {
            key.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else key: v for key, v in made.items()
        }
    save_file(tensors, stacks / "model.safetensors", metadata={"format": "pt"})
    expected = model.state_dict()
    whole, streamed = load_model(str(stacks)), open_streamed(str(stacks))
    assert whole.model.state_dict().keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(whole.model.state_dict()[name], value)
        if ".experts." in name:
            assert torch.equal(streamed.stored(name).float(), value)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("granitemoe_swa", "the files of granitemoe_swa stack them"),
        ("glm_moe_dsa", "a layer of glm_moe_dsa hands on more than a hidden state"),
        ("minimax", "attention of minimax decays by tables in float32"),
        ("never_seen", "no reader was run on quantized experts of never_seen"),
        ("", "no reader was run on quantized experts of this family"),
    ],
)
def test_a_refusal_says_what_was_found(family: str, why: str) -> None:
    assert mixture_advice(family).startswith(f"and {why}")
    assert find_mixture(family) is None


def test_modules_without_partners_are_units_of_their_own() -> None:
    units = mixture_kind(
        ["self_attn.q_a_proj", "self_attn.o_proj", "mlp.experts.0.w1", "mlp.gate"], "mlp.experts"
    ).units
    assert [(unit.name, unit.fused) for unit in units] == [
        ("self_attn.q_a_proj", None), ("o", None), ("experts", "mlp.experts"),
    ]  # fmt: skip


def test_single_experts_are_refused_with_the_reason(load: Load) -> None:
    from quant_fairness_plugin.config import FairConfig

    units = tuple(unit.name for unit in load("qwen3_moe").family.units)
    config = FairConfig(protect_layers="none", protect_units=("1.experts.3",))
    with pytest.raises(InvalidLayerError, match=r"1\.experts\.3 is not a unit of the model \(the routed experts of a"):
        check_units(config, units=lambda _: units, layers=2)


def test_a_folder_and_its_outline_agree(tiny_model: Callable[..., Path]) -> None:
    from quant_fairness_plugin.model.outline import outline_model
    from quant_fairness_plugin.model.resolve import resolve_model

    outline = outline_model(resolve_model(str(tiny_model("qwen2_moe"))))
    twin = with_unfolded_experts(random_model("qwen2_moe"))
    assert outline.family.units == detect_family(twin).units
    assert outline.matrix("model.layers.1.mlp.experts.3.down_proj") == (32, 32)


def test_routers_are_no_norms_of_a_sweep(load: Load) -> None:
    from quant_fairness_plugin.plans.units import map_units

    units = map_units(load("qwen2_moe")).parameters
    assert len(units["layers.1.experts"]) == 4 * 3
    assert set(units["layers.1.norms"]) == {
        "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight",
    }  # fmt: skip
