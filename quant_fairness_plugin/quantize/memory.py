"""How much memory a quantization block by block needs, from the shapes of a model's parameters alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.sizes import shown
from quant_fairness_plugin.quantize.moments import MOST_GRAM_COLUMNS, WIDE_COLUMNS

_FLOAT64, _FLOAT32, _STORED = 8, 4, 2
_SOLVING_COPIES = 3
"""Of a Hessian, beside itself, while it is solved: in the order of the solution, and what a factor is made from and
becomes."""
_WEIGHT_COPIES = 9
"""Of a matrix, in the dtype of its Hessian, while it is solved and refined."""


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
    shapes: Mapping[str, tuple[int, ...]],
    groups: Iterable[Sequence[tuple[int, int]]],
    *,
    blocks: str,
    tokens: int,
    compares: bool = False,
    columns: bool = False,
) -> QuantizeNeeds:
    """Return what quantizing this model block by block needs.

    Args:
        shapes: parameter → shape.
        groups: rows and columns of the modules that are solved together, for every fusion group.
        blocks: full name of the list of blocks.
        tokens: of the largest batch.
        compares: whether it compares what modules are given with what the 16-bit model gives them.
        columns: whether modules keep channels in 16 bit, for which they are solved twice.
    """
    layers: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{blocks}."):
            layers.setdefault(name.removeprefix(f"{blocks}.").partition(".")[0], []).append(shape)
    values = max(sum(map(prod, members)) for members in layers.values())
    outputs = max(sum(max(shape) for shape in members if len(shape) == 2) for members in layers.values())
    return QuantizeNeeds(
        block=values * ((1 + compares) * _FLOAT32 + _STORED),
        solving=max(_solving(group, compares=compares, columns=columns) for group in groups),
        running=_FLOAT32 * tokens * outputs,
    )


def _solving(group: Sequence[tuple[int, int]], *, compares: bool, columns: bool) -> int:
    """Return the bytes of Hessians and weights of a fusion group, while they are summed or one of them is solved."""
    inputs, modules = group[0][1], len(group)
    size = _FLOAT64 if inputs <= WIDE_COLUMNS else _FLOAT32
    held = modules * (1 + compares)
    grams = modules if inputs <= MOST_GRAM_COLUMNS else 0
    summing = held + (1 + compares) + 1 + grams  # those of a language, and the product of a batch
    solving = modules * (1 + columns) + _SOLVING_COPIES
    errors = _FLOAT32 * columns * sum(map(prod, group))
    return size * (max(summing, solving) * inputs**2 + _WEIGHT_COPIES * max(map(prod, group))) + errors
