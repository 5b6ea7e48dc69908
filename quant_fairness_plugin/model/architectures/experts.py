"""Mixtures of experts: what marks one, which families are taken, and how files name their experts. No torch.

A family is taken where a reader was run on its quantized experts; every other one is refused by its config alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.model.architectures.architecture import (
    BlockKind,
    FusionGroup,
    Renamings,
    moved_name,
    turned_round,
)

EXPERTS = "experts"
"""The unit of all routed experts of a layer. Servers give them one precision: single experts cannot have their own."""
LINEAR_NAMES = ("gate_proj", "up_proj", "down_proj")
"""What most files call the matrices of an expert: gate, up, down."""
_COUNT_KEY = re.compile(r"(\w+_)?(n|num)_(\w+_)?experts")
"""`num_experts`, `num_local_experts`, `n_routed_experts`, `moe_num_experts`, …, but not `num_experts_per_tok`."""
_WORDS = frozenset({"expert", "experts", "moe", "router"})
"""Parts of module names, between dots and underscores, such as `block_sparse_moe` or `shared_expert_gate`."""
_ROUTERS = frozenset({"gate", "router"})
"""Modules that choose experts, and what some of them are made of (`mlp.gate.wg`)."""
_ENDS = {
    ("q_proj", "k_proj", "v_proj"): ("qkv", "qkv_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("qkv_a", "fused_qkv_a_proj"),
    ("in_proj_qkv", "in_proj_z"): ("qkvz", "in_proj_qkvz"),
    ("gate_proj", "up_proj"): ("gate_up", "gate_up_proj"),
    ("w1", "w3"): ("gate_up", "w13"),
    ("o_proj",): ("o", None),
    ("out_proj",): ("o", None),
    ("down_proj",): ("down", None),
    ("w2",): ("down", None),
}
"""Last names of linear modules that read the same tensor → the unit, and the last name of the merged module."""
_LAST = frozenset(last for ends, (unit, _) in _ENDS.items() if unit in ("o", "down") for last in ends)
"""Of a module's linear parts, these are run after all others, wherever its class makes them."""
_CHOOSES = "chooses the tokens that attention looks at, as a router chooses experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How the files of some families hold the experts that Transformers stacks in one tensor a layer."""

    families: tuple[str, ...]
    """Values of `model_type`."""
    names: tuple[str, str, str] = LINEAR_NAMES
    """Names of the matrices of one expert in files and servers: gate, up, down."""
    moved: Renamings = ()
    """Parts of names in Transformers, and what files and servers call them instead."""

    def stored_name(self, name: str) -> str:
        """Return what files call a module or tensor of the loaded model."""
        return moved_name(name, self.moved)

    def loaded_name(self, name: str) -> str:
        """Return what the loaded model calls a module or tensor of the files."""
        return moved_name(name, turned_round(self.moved))


_MIXTRAL = ("w1", "w3", "w2")
_SPARSE = ("mlp", "block_sparse_moe")
MIXTURES = (
    Mixture(
        families=(
            "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe",
            "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1", "flex_olmo", "glm4_moe_lite",
            "hunyuan_v1_moe", "mellum", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "solar_open",
        )
    ),
    Mixture(families=("axk1",), moved=(("mlp.post_mlp_layernorm", "post_mlp_layernorm"),)),
    Mixture(families=("ernie4_5_moe",), moved=(("mlp.gate.moe_statics", "mlp.moe_statics"),)),
    Mixture(families=("exaone_moe",), moved=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),)),
    Mixture(
        families=("hy_v3",),
        moved=(
            ("mlp.gate", "mlp.router.gate"), ("mlp.e_score_correction_bias", "mlp.expert_bias"),
            ("mlp.shared_experts", "mlp.shared_mlp"),
        ),
    ),
    Mixture(
        families=("laguna",),
        moved=(
            ("mlp.gate.e_score_correction_bias", "mlp.experts.e_score_correction_bias"),
            ("mlp.shared_experts", "mlp.shared_expert"),
        ),
    ),
    Mixture(families=("mimo_v2_flash",), moved=(("self_attn.sinks", "self_attn.attention_sink_bias"),)),
    Mixture(families=("mixtral", "minimax_m2"), names=_MIXTRAL, moved=(_SPARSE,)),
    Mixture(families=("phimoe",), names=_MIXTRAL, moved=(("mlp.router", "block_sparse_moe.gate"), _SPARSE)),
    Mixture(families=("lfm2_moe",), names=_MIXTRAL),
)  # fmt: skip
_STACKED = (
    "aria_text", "dbrx", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "granitemoe_swa", "inkling_text", "jetmoe", "llama4", "llama4_text", "minimax_m3_vl_text",
)  # fmt: skip
_STREAMS = ("glm_moe_dsa", "hy_v4", "zaya")
_WHY: Mapping[str, str] = {
    **dict.fromkeys(_STACKED, "the files of {family} stack them, and no reader takes them quantized one by one"),
    **dict.fromkeys(_STREAMS, "a layer of {family} hands on more than a hidden state, which no walk by layers passes"),
    "axk2": "a norm of {family} holds linear modules, which run before those that stand in front of them",
    "longcat_flash": "a layer of {family} holds two of attention, which config.json counts once and twice",
    "minimax": "attention of {family} decays by tables in float32, with which no 16-bit run of it is computed",
    "qwen4_exp": "what 4 bits do to the modules that mix the streams of {family} was not measured",
    "qwen4_exp_text": "what 4 bits do to the modules that mix the streams of {family} was not measured",
}
"""Families that were looked at and are not taken, each with what was found; of any other, no reader was run on them."""


def find_mixture(model_type: str) -> Mixture | None:
    """Return how the files of a family hold its experts; None where the family is no mixture, or not taken."""
    return next((mixture for mixture in MIXTURES if model_type in mixture.families), None)


def mixture_advice(model_type: str) -> str:
    """Return why a mixture is refused, with what is accepted, to end a sentence that says what was found."""
    taken = ", ".join(sorted(name for mixture in MIXTURES for name in mixture.families))
    why = _WHY.get(model_type, "no reader was run on quantized experts of {family}")
    why = why.format(family=model_type or "this family")
    return (
        f"and {why}; accepted are {taken}, and dense models. Use a dense model of the family, or quantize this one "
        "with a tool that knows its experts (gptqmodel, llm-compressor)."
    )


def expert_counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the config's counts of more than one expert by key, those of its parts too (`text_config`)."""
    if config.get("is_moe") is False:  # Doge: the counts are those that it would have
        return
    for key, value in config.items():
        if isinstance(value, dict):
            yield from expert_counts(value)
        elif _COUNT_KEY.fullmatch(str(key)):  # a list has one count per layer
            counts = [count for count in (value if isinstance(value, list) else [value]) if type(count) is int]
            if max(counts, default=0) > 1:
                yield key, max(counts)


def names_experts(module: str) -> bool:
    """Return whether a module's name is that of experts or of what routes tokens to them."""
    return not _WORDS.isdisjoint(module.replace(".", "_").split("_")) or module.split(".")[-1] == "gate"


def mixture_kind(linears: Sequence[str], experts: str) -> BlockKind:
    """Return what a block of a mixture is made of: attention, all routed experts as one, and what every token passes.

    Routers and the gates of shared experts are in no unit: they stay in 16 bit.

    Args:
        linears: the linear modules of the block in the order in which it holds them, the experts' own included.
        experts: name of the module of the routed experts, relative to the block; empty in a layer that has none.
    """
    routed = tuple(name for name in linears if experts and name.startswith(f"{experts}."))
    others = [name for name in linears if name not in routed and not _routes(name)]
    kept = tuple((name, _CHOOSES) for name in others if "indexer" in name.split("."))
    units = list(_fused(_as_run([name for name in others if name not in dict(kept)])))
    if routed:
        place = f"{experts.rpartition('.')[0]}."
        before = (i for i, unit in enumerate(units) if unit.modules[0].startswith(place))
        units.insert(next(before, len(units)), FusionGroup(EXPERTS, routed, experts, routed=True))
    return BlockKind(tuple(units), kept=kept)


def _routes(name: str) -> bool:
    """Return whether a linear module of a block chooses experts, or weighs what shared ones say."""
    return names_experts(name.rpartition(".")[2]) or not _ROUTERS.isdisjoint(name.split("."))


def _as_run(names: list[str]) -> list[str]:
    """Return linear modules with those last that write what the module around them hands on."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return sorted(names, key=lambda name: (parents.index(name.rpartition(".")[0]), name.rpartition(".")[2] in _LAST))


def _fused(names: list[str]) -> Iterator[FusionGroup]:
    """Yield the fusion groups of modules that are no routed experts, each once."""
    left = list(names)
    while left:
        parent, _, last = left[0].rpartition(".")
        ends, (unit, merged) = next(
            (entry for entry in _ENDS.items() if last in entry[0] and {f"{parent}.{e}" for e in entry[0]} <= set(left)),
            ((last,), (left[0], None)),
        )
        modules = tuple(f"{parent}.{end}" for end in ends)
        shared = "shared_" if "shared" in parent else ""
        yield FusionGroup(shared + unit if unit != left[0] else unit, modules, merged and f"{parent}.{merged}")
        left = [name for name in left if name not in modules]
