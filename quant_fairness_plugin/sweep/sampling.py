"""What scores and exact evaluations of plans are estimated from, and the time that there is for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from quant_fairness_plugin.config.parsers import read_duration

SENTENCES = 12
"""Of each language, evenly spread."""
LEAST_SENTENCES = 4
"""Of each language, where there is no time for more: two halves of two still show a choice that is not stable."""
DRAWS = 2
"""Labels of each token. With 12 sentences: 24 squared slopes a figure, each as variable as one of a normal variate."""
EXACT_SENTENCES = 8
"""Of each language, on which a plan and its neighbours are evaluated exactly."""
BACKWARD_STEPS = 3
"""What a block costs on the way back, in forward passes: one with its graph, and the graph back for two labels."""
EXACT_BY_SCORED = 0.5
"""What evaluating a plan on a sentence takes at most, in sentences that are scored: two passes through the blocks
instead of four or more, and three states at the head instead of four. Counts until one was evaluated."""


@dataclass(slots=True)
class SearchTime:
    """A stated time, of which what is done inside `counted` is taken off."""

    text: str
    """As the user wrote it."""
    clock: Callable[[], float] = time.monotonic
    """Seconds."""
    whole_pass: float | None = None
    """Forecast seconds of scoring as many sentences as without a limit of time; None where that is not known."""
    sentence: float | None = None
    """Seconds that scoring a sentence of each language took; None before."""
    _spent: float = field(default=0.0, init=False)
    _since: float | None = field(default=None, init=False)

    @property
    def seconds(self) -> float:
        """All of it."""
        return read_duration(self.text)

    @property
    def left(self) -> float:
        """Seconds; below 0 where more was taken."""
        running = 0.0 if self._since is None else self.clock() - self._since
        return self.seconds - self._spent - running

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Let the clock run inside a `with` block."""
        self._since = self.clock()
        try:
            yield
        finally:
            self._spent += self.clock() - self._since
            self._since = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What scores are estimated from."""

    sentences: int = SENTENCES
    """Of each language."""
    draws: int = DRAWS
    """Labels drawn for each token."""
    seed: int = 0
    """Of the labels."""
    search: SearchTime | None = None
    """The time that there is; where it does not hold all sentences, as many as it holds are scored."""


def spread_places(length: int, count: int) -> list[int]:
    """Return so many places of a list, evenly spread over it.

    >>> spread_places(10, 3)
    [0, 3, 6]
    """
    some = min(count, length)
    return [i * length // some for i in range(some)]
