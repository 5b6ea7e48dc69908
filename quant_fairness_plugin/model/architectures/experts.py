"""Mixtures of experts: what marks one, which families are taken, and how files name their experts. No torch.

A family is taken where a reader was run on its quantized experts; every other one is refused by its config alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.model.architectures.architecture import FusionGroup, moved_name

EXPERTS = "experts"
"""The unit of all routed experts of a layer. Servers give them one precision: single experts cannot have their own."""
LINEAR_NAMES = ("gate_proj", "up_proj", "down_proj")
"""What most files call the matrices of an expert: gate, up, down."""
_COUNT_KEY = re.compile(r"(\w+_)?(n|num)_(\w+_)?experts")
"""`num_experts`, `num_local_experts`, `n_routed_experts`, `moe_num_experts`, …, but not `num_experts_per_tok`."""
_WORDS = frozenset({"expert", "experts", "moe", "router"})
"""Parts of module names, between dots and underscores, such as `block_sparse_moe` or `shared_expert_gate`."""
_ENDS = {
    ("q_proj", "k_proj", "v_proj"): ("qkv", "qkv_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("qkv_a", "fused_qkv_a_proj"),
    ("gate_proj", "up_proj"): ("gate_up", "gate_up_proj"),
    ("o_proj",): ("o", None),
    ("down_proj",): ("down", None),
}
"""Last names of linear modules that read the same tensor → the unit, and the last name of the merged module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How the files of some families hold the experts that Transformers stacks in one tensor a layer."""

    families: tuple[str, ...]
    """Values of `model_type`."""
    names: tuple[str, str, str] = LINEAR_NAMES
    """Names of the matrices of one expert in files and servers: gate, up, down."""
    moved: tuple[str, str] | None = None
    """Name of the module around router and experts in Transformers, and in files and servers."""

    def stored_name(self, name: str) -> str:
        """Return what files call a module or tensor of the loaded model."""
        return moved_name(name, self.moved)

    def loaded_name(self, name: str) -> str:
        """Return what the loaded model calls a module or tensor of the files."""
        return moved_name(name, None if self.moved is None else self.moved[::-1])

    @property
    def places(self) -> tuple[str, ...]:
        """Every name of the module around router and experts."""
        return self.moved or ("mlp",)


MIXTURES = (
    Mixture(families=("qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "glm4_moe")),
    Mixture(families=("mixtral",), names=("w1", "w3", "w2"), moved=("mlp", "block_sparse_moe")),
)
_STACKED = ("granitemoe", "granitemoehybrid", "granitemoeshared", "gpt_oss", "llama4", "llama4_text", "gemma4_text")
"""Families whose files stack the experts too: no reader takes them quantized one by one, or none here can check it."""


def find_mixture(model_type: str) -> Mixture | None:
    """Return how the files of a family hold its experts; None where the family is no mixture, or not taken."""
    return next((mixture for mixture in MIXTURES if model_type in mixture.families), None)


def mixture_advice(model_type: str) -> str:
    """Return why a mixture is refused, with what is accepted, to end a sentence that says what was found."""
    taken = ", ".join(sorted(name for mixture in MIXTURES for name in mixture.families))
    family = model_type or "this family"
    why = f"the files of {family} stack them, and no reader takes them quantized one by one"
    if model_type not in _STACKED:
        why = f"no reader was run on quantized experts of {family}"
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


def mixture_units(linears: Iterable[str], experts: str) -> tuple[FusionGroup, ...]:
    """Return the units of a block with experts: attention, all routed experts as one, and what every token passes.

    Gates of shared experts are in no unit: they stay in 16 bit, as routers do.

    Args:
        linears: the linear modules of the block in forward order, the experts' own included.
        experts: name of the module of the routed experts, relative to the block; empty in a layer that has none.
    """
    if not experts:
        return tuple(_fused(list(linears)))
    routed = tuple(name for name in linears if experts and name.startswith(f"{experts}."))
    others = [name for name in linears if name not in routed and not names_experts(name.rpartition(".")[2])]
    units = list(_fused(others))
    if not routed:
        return tuple(units)
    last = max((i for i, unit in enumerate(units) if unit.modules[0].startswith("self_attn.")), default=-1)
    return (*units[: last + 1], FusionGroup(EXPERTS, routed, experts, routed=True), *units[last + 1 :])


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
