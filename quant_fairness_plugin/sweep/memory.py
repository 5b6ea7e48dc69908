"""How much memory a layer-by-layer sweep needs, from the shapes of a model's parameters alone. No torch.

Counted is what the sweep itself holds; the interpreter and its libraries (about 0.4 GB with torch) come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.devices import ByDevice
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.model.sizes import shown

PIECE_TOKENS = 1024
"""Tokens that a block is given at once on a CPU, all stacked states together; a single state can have more."""
HEAD_TOKENS = 4096
"""The same for the head. It is no function of the budget: what is computed together decides the last bits."""
_ROUNDING_COPIES = 4
"""What rounding a matrix takes at its peak, in float32 copies of it (measured: 3.5 with every clipping rule)."""
_HEAD_COPIES = 3
_STORED_BYTES, _FLOAT32_BYTES = 2, 4


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that are needed at once, beside the hidden states between two layers."""

    blocks: int
    """One block in every precision, and the next one in 16 bit."""
    work: int
    """The most that rounding a matrix, running a block, the head, or units around the blocks takes beside them."""

    @property
    def least(self) -> int:
        """The smallest budget."""
        return self.blocks + self.work

    def left_for_states(self, budget: int) -> int:
        """Return what a budget leaves for the hidden states between two layers.

        Raises:
            ResourceError: the budget does not hold one block in every precision.
        """
        if budget < self.least:
            raise ResourceError(
                f"memory budget {shown(budget)}: one block in every precision and what it takes to run it need "
                f"{shown(self.least)}; raise the budget to that or more, or use a machine with more memory"
            )
        return budget - self.least


def count_needs(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    blocks: str,
    precisions: int,
    value_bytes: int = _FLOAT32_BYTES,
    tokens: int = PIECE_TOKENS,
    widened: int = 0,
) -> Needs:
    """Return what a sweep of this model needs.

    Args:
        shapes: parameter → shape.
        blocks: full name of the list of blocks.
        precisions: how many precisions but 16 bit a block is held in.
        value_bytes: of one value as it is computed with.
        tokens: of the largest batch, or that a block is given at once where that is more.
        widened: values of the tables around the blocks that plans quantize.
    """
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{blocks}."):
            layers.setdefault(name.removeprefix(f"{blocks}.").partition(".")[0], []).append(shape)
    values = max(sum(map(prod, members)) for members in layers.values())
    largest = max(prod(shape) for members in layers.values() for shape in members)
    # The larger side of a matrix is at least its outputs, whichever way round it is stored.
    outputs = max(sum(max(shape) for shape in members if len(shape) == 2) for members in layers.values())
    width = max(min(shape) for members in layers.values() for shape in members if len(shape) == 2)
    work = [
        _ROUNDING_COPIES * _FLOAT32_BYTES * largest,
        value_bytes * max(tokens, PIECE_TOKENS) * outputs,
        _HEAD_COPIES * value_bytes * max(tokens, HEAD_TOKENS) * width,
        (_ROUNDING_COPIES * _FLOAT32_BYTES + value_bytes) * widened,
    ]
    return Needs(values * (value_bytes * (1 + precisions) + _STORED_BYTES), max(work))


def check_budget(outline: Outline, budget: int, *, precisions: int) -> None:
    """Refuse a budget that is too small for a model that is not loaded yet.

    Args:
        outline: the model.
        budget: bytes.
        precisions: how many precisions but 16 bit a block is held in.

    Raises:
        ResourceError: says how much is needed.
    """
    count_needs(outline.shapes, blocks=outline.family.blocks, precisions=precisions).left_for_states(budget)


STATES_IN_MEMORY = 256 << 20
"""Bytes of hidden states between two layers that are held without a memory budget; beyond, they go to files."""


BATCH_TOKENS = 512
"""Tokens of a batch, padding included. Its hidden states are held for every prefix at once."""


CONTEXT = 2048
"""Longest window of a sentence, where the model allows it."""


STACK_TOKENS = ByDevice(cpu=1024, accelerator=1 << 15)
"""Most tokens that a block is given at once, all stacked states together. On a CPU, so few that the widest activations
still fit its cache."""
