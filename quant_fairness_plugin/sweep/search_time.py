"""As many scored sentences as fit into the time for a search (`--time`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from quant_fairness_plugin.artifacts import Precision, TextSet
from quant_fairness_plugin.sweep.sampling import LEAST_SENTENCES, SearchTime, spread_places

SCORING_SHARE = 0.75
"""Of the time that is left, for scores; the rest is for exact evaluations of the plans that they lead to."""
_Value = TypeVar("_Value")
Scored = tuple[dict[str, dict[Precision, dict[str, tuple[float, ...]]]], dict[str, tuple[int, ...]]]
"""Unit → precision → language → nats of each sentence; language → bytes of each sentence."""


def score_in_time(
    score: Callable[[TextSet, int], Scored], texts: TextSet, wanted: int, *, seed: int, search: SearchTime | None
) -> Scored:
    """Return the scores of so many sentences, or of as many as fit into what is left of the time.

    Where a forecast does not say that all of them fit, the fewest that a plan is made from come first; what they took
    says how many more there is time for.

    Args:
        score: scores sentences with labels of a seed.
        texts: the sentences to choose from.
        wanted: how many to score.
        seed: of the labels.
        search: the time; None scores all at once.
    """
    wanted = min(wanted, len(texts))
    least = min(LEAST_SENTENCES, wanted)
    if search is None:
        return score(texts.take(spread_places(len(texts), wanted)), seed)
    before, allowed = search.left, SCORING_SHARE * search.left
    together = search.whole_pass is not None and search.whole_pass <= allowed
    first = spread_places(len(texts), wanted if together else least)
    scored = score(texts.take(first), seed)
    search.sentence = (before - search.left) / len(first)
    more = wanted - len(first)
    if search.sentence > 0:
        more = min(more, int((allowed - (before - search.left)) / search.sentence))
    if more < 1:
        return scored
    rest = [place for place in range(len(texts)) if place not in first]
    others = texts.take([rest[place] for place in spread_places(len(rest), more)])
    return _joined(scored, score(others, seed + 1))  # labels of their own


def _joined(first: Scored, second: Scored) -> Scored:
    """Return the scores of both sets of sentences."""
    return (
        {
            unit: {kind: _appended(values, second[0][unit][kind]) for kind, values in kinds.items()}
            for unit, kinds in first[0].items()
        },
        _appended(first[1], second[1]),
    )


def _appended(
    first: Mapping[str, tuple[_Value, ...]], second: Mapping[str, tuple[_Value, ...]]
) -> dict[str, tuple[_Value, ...]]:
    """Return each name's values of both."""
    return {name: values + second[name] for name, values in first.items()}
