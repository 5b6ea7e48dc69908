"""A measured number with its interval, or the reason why there is none; and how intervals are made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Undefined:
    """The place of a number that could not be measured. Never a silent default."""

    undefined: str
    """The reason, as one sentence."""


Number = Interval | Undefined


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals and tests are made: the same resamples of the sentences for every plan and language."""

    reference: str | None = "en"
    """Language of excess and disparity; None where there is none."""
    draws: int = 2000
    """Resamples of the sentences."""
    seed: int = 0
