"""How much memory a quantization block by block needs, from the shapes of a model's parameters alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.sizes import shown

_FLOAT64, _FLOAT32, _STORED = 8, 4, 2
_HESSIAN_COPIES = 8
"""Of the widest inputs, in float64: one per module of a fusion group of three, and those that solving takes."""
_ACROSS_COPIES = 4
"""As many again where inputs are compared with the 16-bit model's: one per module, and that of one language."""
_WEIGHT_COPIES = 6
"""Of the largest matrix, in float64, while it is solved."""


@dataclass(frozen=True, slots=True)
class QuantizeNeeds:
    """Bytes that are needed at once, beside the hidden states between two blocks."""

    block: int
    """A block in float32, as it was, too, where inputs are compared, and the next one in 16 bit."""
    solving: int
    """Hessians and weights of one fusion group."""
    running: int
    """The widest activations of one batch."""

    @property
    def least(self) -> int:
        """The smallest budget."""
        return self.block + max(self.solving, self.running)

    def left_for_states(self, budget: int) -> int:
        """Return what a budget leaves for the hidden states between two blocks.

        Raises:
            ResourceError: the budget does not hold one block and what solving it takes.
        """
        if budget < self.least:
            raise ResourceError(
                f"memory budget {shown(budget)}: one block, and what it takes to solve its widest module, need "
                f"{shown(self.least)}; raise the budget to that or more, or use a machine with more memory"
            )
        return budget - self.least


def count_quantize_needs(
    shapes: Mapping[str, tuple[int, ...]], *, blocks: str, tokens: int, compares: bool = False
) -> QuantizeNeeds:
    """Return what quantizing this model block by block needs.

    Args:
        shapes: parameter → shape.
        blocks: full name of the list of blocks.
        tokens: of the largest batch.
        compares: whether it compares what modules are given with what the 16-bit model gives them.
    """
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{blocks}."):
            layers.setdefault(name.removeprefix(f"{blocks}.").partition(".")[0], []).append(shape)
    matrices = [shape for members in layers.values() for shape in members if len(shape) == 2]
    values = max(sum(map(prod, members)) for members in layers.values())
    # The larger side of a matrix is at least its inputs, whichever way round it is stored.
    widest, largest = max(max(shape) for shape in matrices), max(map(prod, matrices))
    outputs = max(sum(max(shape) for shape in members if len(shape) == 2) for members in layers.values())
    copies = _HESSIAN_COPIES + _ACROSS_COPIES * compares
    return QuantizeNeeds(
        block=values * ((1 + compares) * _FLOAT32 + _STORED),
        solving=_FLOAT64 * (copies * widest**2 + _WEIGHT_COPIES * largest),
        running=_FLOAT32 * tokens * outputs,
    )
