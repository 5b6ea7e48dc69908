"""Names under which servers merge linear modules that read the same tensor, and what the project calls these groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MergedName:
    """Modules that belong together."""

    modules: tuple[str, ...]
    """Names relative to the block, in the order in which servers concatenate them."""
    name: str | None
    """The project's name of the group; None where structure has to say."""
    fused: str | None
    """The merged module, relative to the block; None where servers merge nothing."""


_PATTERNS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv", "qkv_proj"),
    (("gate_proj", "up_proj"), "gate_up", "gate_up_proj"),
    (("w1", "w3"), "gate_up", "w13"),
    (("in_proj_qkv", "in_proj_z"), "qkvz", "in_proj_qkvz"),
    (("in_proj_b", "in_proj_a"), "ba", "in_proj_ba"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "qkv_a", "fused_qkv_a_proj"),
)
"""Last parts of module names → the group's name, and the last part of the merged module's name."""
_QUERIES = frozenset({"q_proj", "query", "query_proj", "wq"})


def merged_names(modules: Sequence[str]) -> Iterator[MergedName]:
    """Yield the groups that servers make of modules of one parent that read the same tensor.

    Where a layer lacks one part of a merged module (keys and values that come from another layer), the others are still
    merged under its name. What no server merges comes last, as one group.
    """
    left = list(modules)
    for parts, name, fused in _PATTERNS:
        members = [module for part in parts for module in left if module.rpartition(".")[2] == part]
        if len(members) > 1 or (members and name == "qkv" and reads_queries(members)):
            left = [module for module in left if module not in members]
            parent = members[0].rpartition(".")[0]
            yield MergedName(tuple(members), name, f"{parent}.{fused}" if parent else fused)
    if left:
        yield MergedName(tuple(left), None, None)


def reads_queries(modules: Sequence[str]) -> bool:
    """Return whether one of the modules makes the queries of attention, by its name."""
    return any(module.rpartition(".")[2] in _QUERIES for module in modules)
