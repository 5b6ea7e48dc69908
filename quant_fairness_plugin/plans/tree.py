"""Which model states a set of plans needs: plans merged into a tree of prefixes. Plain data, no torch.

The hidden state after layer j depends only on the precisions of what comes before. Plans that agree up to there share
it, so the engine runs every *node* of the tree once instead of every plan from the beginning. A stage is a place where
plans can differ: what comes before the blocks, each block, what comes after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Precision

Variant = tuple[tuple[str, Precision], ...]
"""What is not in 16 bit in one stage: sorted pairs of unit and precision. Empty = all of it in 16 bit."""


@dataclass(frozen=True, slots=True)
class State:
    """A named choice of precisions. Units that are not listed are in 16 bit."""

    name: str
    precisions: Mapping[str, Precision]
    """Full unit name (`layers.3.down`, `embeddings`) → precision."""


@dataclass(frozen=True, slots=True)
class Node:
    """A stage in one variant, after one prefix."""

    parent: int
    """Index of the prefix among the nodes of the stage before; 0 in the first stage."""
    variant: Variant


@dataclass(frozen=True, slots=True)
class StateTree:
    """The nodes of every stage, and where each state ends."""

    stages: tuple[tuple[Node, ...], ...]
    leaves: dict[str, int]
    """State → index of its node in the last stage. Equal states share one."""

    def by_variant(self, stage: int) -> dict[Variant, tuple[int, ...]]:
        """Return the nodes of a stage that run with the same weights: variant → their indices."""
        groups: dict[Variant, list[int]] = {}
        for index, node in enumerate(self.stages[stage]):
            groups.setdefault(node.variant, []).append(index)
        return {variant: tuple(nodes) for variant, nodes in groups.items()}

    @property
    def block_passes(self) -> int:
        """How many times a block is run on a batch: the nodes of all stages between the first and the last."""
        return sum(len(stage) for stage in self.stages[1:-1])


def build_tree(states: Sequence[State], stages: Sequence[Sequence[str]]) -> StateTree:
    """Merge states into a tree of prefixes. Nodes of a stage are in the order in which their first state comes.

    Args:
        states: what is to be evaluated.
        stages: the units of each stage, by full name; every unit of every state is in one of them.

    Raises:
        ValueError: a state lists a unit that no stage has.
    """
    known = {unit for units in stages for unit in units}
    for state in states:
        if unknown := sorted(set(state.precisions) - known):
            raise ValueError(f"state {state.name!r}: no stage holds {', '.join(unknown)}")
    nodes: list[dict[Node, int]] = [{} for _ in stages]
    leaves: dict[str, int] = {}
    for state in states:
        index = 0
        for level, units in enumerate(stages):
            node = Node(index, _variant(state, units))
            index = nodes[level].setdefault(node, len(nodes[level]))
        leaves[state.name] = index
    return StateTree(tuple(tuple(level) for level in nodes), leaves)


def _variant(state: State, units: Sequence[str]) -> Variant:
    members = ((unit, state.precisions[unit]) for unit in units if unit in state.precisions)
    return tuple(sorted((unit, precision) for unit, precision in members if precision != "fp16"))
