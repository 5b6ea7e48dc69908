"""Solve the routed experts of a layer, each on the tokens that are routed to it.

The output of a layer's experts is a sum of g f(x) over the chosen ones, so an error of f counts with g², the square of
the gate weight. What a token counts is divided by the mean squared output of *all* experts of the layer in its
language: per expert, three tokens of one language would weigh as much as three thousand of another.

An expert with fewer tokens than a matrix has columns leaves directions of which no token says anything. What is missing
is filled up with tokens as the whole layer is given them: those of every expert, all languages by their share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.experts import Experts, Routing
from quant_fairness_plugin.model.rehearsal import EnoughError
from quant_fairness_plugin.quantize.blocks import Running
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.moments import working_dtype

PIECE = 4096
"""Rows that are widened to the working dtype at once."""


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """The tokens of the calibration text as they reach the experts of one layer."""

    hidden: Tensor
    """`[tokens, width]`."""
    chosen: Tensor
    """`[tokens, k]`: numbers of experts."""
    gates: Tensor
    """`[tokens, k]`: gate weights."""
    shares: Tensor
    """`[tokens]`: a language's weight, over its tokens and the mean squared output of the layer's experts in it."""

    def of_expert(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the inputs `[n, width]` of an expert, and what each counts `[n]`."""
        token, place = (self.chosen == number).nonzero(as_tuple=True)
        return self.hidden[token], self.shares[token] * self.gates[token, place].square()

    def of_layer(self, most: int) -> tuple[Tensor, Tensor]:
        """Return inputs of any expert, evenly over all tokens, and what each counts in the mean over its choices.

        Args:
            most: how many are enough.
        """
        step = max(1, len(self.hidden) // most)
        return self.hidden[::step], self.shares[::step] * self.gates[::step].square().mean(1)


@torch.no_grad()
def routed_rows(
    block: nn.Module, experts: Experts, layer: int, batches: Sequence[Running], calibration: CalibrationSet
) -> RoutedRows:
    """Return what the experts of a layer are given, with their weights as they are.

    Raises:
        UnsupportedModelError: the block does not hand its experts every token exactly once.
    """
    collected: list[Routing] = []
    shares: list[Tensor] = []
    for language, tokens in calibration.coverage.items():
        routings = list(_routings(block, experts, layer, [b for b in batches if b.language == language]))
        seen = sum(len(routing.hidden) for routing in routings)
        if seen != tokens:
            raise UnsupportedModelError(
                f"the block gave its experts {seen} of {tokens} calibration tokens of {language}; only blocks that "
                "route every token once can be calibrated. Quantize with method 'rtn'"
            )
        energy = sum(_energy(experts, routing) for routing in routings) / tokens
        share = calibration.shares[language] / tokens / energy if energy > 0 else 0.0
        collected += routings
        shares.append(torch.full((tokens,), share, dtype=torch.float32, device=routings[0].hidden.device))
    return RoutedRows(
        hidden=torch.cat([routing.hidden for routing in collected]),
        chosen=torch.cat([routing.chosen for routing in collected]),
        gates=torch.cat([routing.weights.float() for routing in collected]),
        shares=torch.cat(shares),
    )


def _energy(experts: Experts, routing: Routing) -> float:
    """Return the sum over tokens of the squared output of a layer's experts."""
    return float(experts(routing.hidden, routing.chosen, routing.weights).double().square().sum())


def _routings(block: nn.Module, experts: Experts, layer: int, batches: Sequence[Running]) -> Iterator[Routing]:
    seen: list[Routing] = []

    def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
        seen.append(experts.routing(positional))
        raise EnoughError

    handle = experts.register_forward_pre_hook(note)
    try:
        for batch in batches:
            with suppress(EnoughError):
                batch.run(block, layer)
            yield from seen
            seen.clear()
    finally:
        handle.remove()


@dataclass(frozen=True, slots=True)
class Stage:
    """Matrices of one expert that read the same rows."""

    expert: int
    names: tuple[str, ...]
    """Full module names."""
    hessian: Tensor
    """`[cols, cols]`."""


@torch.no_grad()
def expert_stages(experts: Experts, prefix: str, rows: RoutedRows) -> Iterator[Stage]:
    """Yield the stages of every expert in the order to solve them: gate and up, then down.

    The rows of `down` are those that come out of gate and up as they are when it is asked for: the caller leaves what
    it solved in the model before going on.

    Args:
        experts: the experts of a layer.
        prefix: their full name.
        rows: what they are given.
    """
    for number in range(len(experts)):
        *first, last = (f"{prefix}.{number}.{name}" for name in experts.names)
        hidden, counts = rows.of_expert(number)
        width = hidden.shape[1]
        spare, spare_counts = rows.of_layer(width) if len(hidden) < width else (hidden[:0], counts[:0])
        yield Stage(number, tuple(first), filled_moment(hidden, counts, spare, spare_counts))
        width = next(iter(reversed(experts.expert(number).values()))).in_features
        spare, spare_counts = rows.of_layer(width) if len(hidden) < width else (hidden[:0], counts[:0])
        inner, others = experts.inner(number, hidden), experts.inner(number, spare)
        yield Stage(number, (last,), filled_moment(inner, counts, others, spare_counts))


def filled_moment(rows: Tensor, counts: Tensor, others: Tensor, other_counts: Tensor) -> Tensor:
    """Return Σ a xxᵀ over an expert's rows, filled up to as many rows as there are columns with the mean of others.

    Args:
        rows: `[n, cols]`.
        counts: `[n]`: what each counts.
        others: `[m, cols]`: rows as the whole layer is given them; not used where n is at least the columns.
        other_counts: `[m]`.

    Returns:
        `[cols, cols]` in the working dtype.
    """
    total = weighted_moment(rows, counts)
    missing = rows.shape[1] - len(rows)
    if missing > 0 and len(others):
        total += weighted_moment(others, other_counts) * (missing / len(others))
    return total


def weighted_moment(rows: Tensor, counts: Tensor) -> Tensor:
    """Return Σ a xxᵀ, `[cols, cols]` in the working dtype, of rows `[n, cols]` that count a `[n]`."""
    columns = rows.shape[1]
    kind = working_dtype(rows.device, columns)
    total = torch.zeros(columns, columns, dtype=kind, device=rows.device)
    for start in range(0, len(rows), PIECE):
        piece = rows[start : start + PIECE].to(kind)
        total += piece.T @ (piece * counts[start : start + PIECE, None].to(kind))
    return total
