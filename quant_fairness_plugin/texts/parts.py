"""The split of a text set into disjoint parts: calibrate 40, search 70, confirm 70 of 180."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Part, TextSet

_SHARES: dict[Part, int] = {"calibrate": 40, "search": 70, "confirm": 70}
# With fewer, a part would hold four sentences or less: too few to choose on, or to confirm with.
SMALLEST_SPLIT = 20


def split_parts(n: int, registers: Sequence[str], seed: int) -> tuple[Part, ...]:
    """Return the part of each of `n` sentences: 40 : 70 : 70, in the whole set and within each register.

    The order in which sentences are dealt out comes from sha256, not from `random`, whose algorithms may change between
    versions of Python.

    Args:
        n: number of sentences; below 20 nothing is split and each part is `all`.
        registers: the register of each sentence; as many as sentences.
        seed: which of the possible splits.

    Returns:
        One part per sentence, in the order of the sentences.

    Raises:
        ValueError: not one register per sentence.
    """
    if len(registers) != n:
        raise ValueError(f"{len(registers)} registers for {n} sentences; give one register per sentence")
    parts: list[Part] = ["all"] * n
    if n < SMALLEST_SPLIT:
        return tuple(parts)
    order = sorted(range(n), key=lambda i: (registers[i], hashlib.sha256(f"{seed}:{i}".encode()).digest()))
    # Webster's method, register after register: after every sentence dealt out each part is within one sentence of its
    # share, so every register, a run of this order, is within two.
    taken: dict[Part, int] = dict.fromkeys(_SHARES, 0)
    for index in order:
        part = max(_SHARES, key=lambda name: _SHARES[name] / (2 * taken[name] + 1))
        parts[index] = part
        taken[part] += 1
    return tuple(parts)


def overlap(texts: TextSet) -> str:
    """Return in one sentence which sentences the parts of a set share; empty where they are disjoint."""
    if not (shared := texts.shared):
        return ""
    return (
        f"the parts of {texts.name} are not disjoint: calibration, search and confirmation share the same sentences, "
        f"{shared} of {len(texts)}, so that no figure on them is held out"
    )


def used_before(texts: TextSet, part: Part) -> str:
    """Return in one sentence what keeps a part from being held out; empty where nothing was selected on it."""
    if part == "confirm":
        return overlap(texts)
    uses = {"calibrate": "calibration uses", "search": "plans are searched on", "all": "calibration uses some of"}
    return f"{uses[part]} these sentences of {texts.name}: not held out"


def true_part(texts: TextSet, part: Part) -> Part:
    """Return the name of a part; `all` where the set was not split, so that each part is the whole of it."""
    return "all" if set(texts.parts) == {"all"} else part


@dataclass(frozen=True, slots=True)
class Sample:
    """The sentences of one part, with what a record of their measurement says of them."""

    texts: TextSet
    part: Part
    """`all` where the set was not split."""
    condition: str
    """What keeps them from being held out; empty where nothing does."""

    @classmethod
    def of(cls, texts: TextSet, part: Part) -> Sample:
        """Return the sample of a part of a whole set."""
        return cls(texts.part(part), true_part(texts, part), used_before(texts, part))
