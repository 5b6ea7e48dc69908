"""The architectures that are known by name, and how one is recognised.

A new family costs one record in `records`, and a tiny random model of it in `tests/tiny.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from quant_fairness_plugin.model.architectures.architecture import (
    Architecture,
    Block,
    BlockKind,
    Fold,
    FusionGroup,
    ScaledActivation,
)
from quant_fairness_plugin.model.architectures.records import ARCHITECTURES

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Block",
    "BlockKind",
    "Fold",
    "FusionGroup",
    "ScaledActivation",
    "find_architecture",
    "known_families",
    "match_architecture",
]


def known_families() -> tuple[str, ...]:
    """Return the `model_type` of every family that has a record, sorted."""
    return tuple(sorted(name for record in ARCHITECTURES for name in record.families))


def find_architecture(model_type: str) -> Architecture | None:
    """Return the record that lists a `model_type`; None where only the model itself can tell its structure."""
    return next((record for record in ARCHITECTURES if model_type in record.families), None)


def match_architecture(block_of: Callable[[Architecture], Block | None], model_type: str) -> Architecture | None:
    """Return the record that the blocks of a model have the structure of; None where there is none.

    Structure decides: `model_type` only picks between records of the same structure.

    Args:
        block_of: the structure of the model's blocks, all alike, where the record says that they are; None where they
            are somewhere else.
        model_type: what the model's config calls it.
    """
    for record in ARCHITECTURES:
        block = block_of(record)
        if block is not None and record.matches(block):
            alike = (other for other in ARCHITECTURES if other.structure == record.structure)
            return next((other for other in alike if model_type in other.families), record)
    return None
