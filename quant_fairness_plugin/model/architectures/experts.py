"""What marks a mixture of experts: keys of its config, names of its modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MIXTURE_ADVICE = (
    "which calibration would reach with too few tokens; dense models are accepted. Use a dense model of the family, or "
    "quantize this one with a tool that knows its experts (gptqmodel, llm-compressor)."
)
_COUNT_KEY = re.compile(r"(\w+_)?(n|num)_(\w+_)?experts")
"""`num_experts`, `num_local_experts`, `n_routed_experts`, `moe_num_experts`, …, but not `num_experts_per_tok`."""
_WORDS = frozenset({"expert", "experts", "moe", "router"})
"""Parts of module names, between dots and underscores, such as `block_sparse_moe` or `shared_expert_gate`."""


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
