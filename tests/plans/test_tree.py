from __future__ import annotations

import pytest

from quant_fairness_plugin.plans.tree import State, StateTree, build_tree

LAYERS = 12
STAGES = (("embeddings",), *((f"layers.{i}.down",) for i in range(LAYERS)), ("head",))


def protecting(*layers: int) -> State:
    return State(f"protect {layers}", {f"layers.{i}.down": "int4" for i in range(LAYERS) if i not in layers})


def replayed(tree: StateTree, name: str) -> dict[str, str]:
    """The precisions on the path from a state's leaf back to the root."""
    index, found = tree.leaves[name], {}
    for stage in reversed(tree.stages):
        node = stage[index]
        found |= dict(node.variant)
        index = node.parent
    return found


def test_protect_one_takes_the_least_number_of_block_passes() -> None:
    states = [State("16 bit", {}), protecting(), *(protecting(i) for i in range(LAYERS))]
    tree = build_tree(states, STAGES)
    # After layer j: j + 1 plans that protected one so far, one that did not, and the 16-bit model, which is the plan
    # that protected layer 0 as long as j = 0.
    assert tree.block_passes == LAYERS * (LAYERS + 3) // 2 + LAYERS - 1 == 101


def test_every_state_keeps_its_own_precisions() -> None:
    states = [State("16 bit", {}), *(protecting(i, j) for i in range(LAYERS) for j in range(i))]
    tree = build_tree(states, STAGES)
    assert {state.name: replayed(tree, state.name) for state in states} == {s.name: dict(s.precisions) for s in states}


def test_equal_states_share_a_leaf_and_16_bit_is_no_variant() -> None:
    tree = build_tree([State("a", {}), State("b", {"layers.3.down": "fp16"})], STAGES)
    assert tree.leaves == {"a": 0, "b": 0}
    assert tree.block_passes == LAYERS


def test_states_that_differ_only_at_the_head_share_all_blocks() -> None:
    tree = build_tree([State("a", {}), State("b", {"head": "int4"})], STAGES)
    assert tree.block_passes == LAYERS
    assert len(tree.stages[-1]) == 2


def test_nodes_of_equal_weights_are_listed_together() -> None:
    tree = build_tree([State("16 bit", {}), protecting(), protecting(0), protecting(1)], STAGES)
    groups = tree.by_variant(2)
    assert sorted(node for nodes in groups.values() for node in nodes) == list(range(len(tree.stages[2])))
    assert {variant: len(nodes) for variant, nodes in groups.items()} == {(): 2, (("layers.1.down", "int4"),): 2}


def test_an_unknown_unit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"state 'a': no stage holds layers\.99\.down"):
        build_tree([State("a", {"layers.99.down": "int4"})], STAGES)
