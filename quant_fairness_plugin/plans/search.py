"""Search for a good set of units to protect where all sets are too many, by evaluating sets. Plain data.

A generation is all sets of one size that are compared; each is scored for real, in one walk, and the best of them are
changed by one unit for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import comb
from typing import get_args

from quant_fairness_plugin.artifacts import Combinations, SearchMethod, SearchRecord, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import find_objective, one_of, set_objectives
from quant_fairness_plugin.plans.plan_set import MOST_COMBINATIONS, Plan

Units = tuple[str, ...]
Evaluate = Callable[[Sequence[Plan]], Mapping[str, StateScores]]
"""Plans → the scores of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """How to search for a set of units."""

    method: SearchMethod
    size: int = 3
    """Units in the set."""
    width: int = 4
    """Sets that a beam keeps; the other methods keep one."""
    objective: str = "worst"
    """What sets are compared by: one of `set_objectives`."""

    def __post_init__(self) -> None:
        if self.method not in get_args(SearchMethod):
            raise ConfigError(f"search {self.method!r} is unknown; use {', '.join(get_args(SearchMethod))}")
        if self.objective not in set_objectives():
            raise ConfigError(
                f"sets cannot be searched by {self.objective!r}; use objective {one_of(set_objectives())}"
            )
        if self.size < 2 or self.width < 1:
            raise ConfigError(
                f"a search for {self.size} units with width {self.width}: use a size of 2 or more, a width of 1 or more"
            )

    @property
    def survivors(self) -> int:
        """Sets of a generation that are changed for the next one."""
        return self.width if self.method == "beam" else 1

    def check(self, units: int) -> None:
        """Refuse a set that would leave nothing quantized.

        Raises:
            ConfigError: not fewer units in the set than there are.
        """
        if self.size >= units:
            raise ConfigError(f"a search for {self.size} of {units} units leaves none quantized; use a smaller size")


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search evaluated."""

    plans: tuple[Plan, ...]
    """Those that were not evaluated before, in the order of their evaluation."""
    scores: dict[str, StateScores]
    """Of these plans."""
    record: SearchRecord


def search_sets(
    search: Search,
    units: Units,
    known: Mapping[Units, StateScores],
    evaluate: Evaluate,
    *,
    languages: Sequence[str],
    most: int = MOST_COMBINATIONS,
) -> SearchResult:
    """Search for the set of `search.size` units whose protection leaves the least damage.

    Sets that were evaluated before are compared along with those that the search evaluates.

    Args:
        search: how.
        units: all units, in forward order.
        known: the scores of every single unit in 16 bit, and of the sets that were evaluated before.
        evaluate: scores the plans of one generation.
        languages: those that count.
        most: plans that are scored at once.

    Raises:
        ConfigError: a set of all units.
    """
    search.check(len(units))
    scores, plans, counts = dict(known), list[Plan](), dict[int, Combinations]()
    parents, change, sizes = [units], _without_one, range(len(units) - 1, search.size - 1, -1)
    if search.method != "backward":
        parents = _best([(unit,) for unit in units], scores, search, languages)
        change, sizes = _with_one_more, range(2, search.size + 1)
    for size in sizes:
        children = list(dict.fromkeys(chain.from_iterable(change(parent, units) for parent in parents)))
        missing = [Plan("protect-one", child) for child in children if child not in scores]
        for start in range(0, len(missing), most):
            some = missing[start : start + most]
            result = evaluate(some)
            scores |= {plan.units: result[plan.name] for plan in some}
        plans += missing
        compared = [subset for subset in scores if len(subset) == size]
        counts[size] = Combinations(evaluated=len(compared), possible=comb(len(units), size))
        parents = _best(compared, scores, search, languages)
    record = SearchRecord(
        method=search.method,
        width=search.survivors,
        size=search.size,
        objective=search.objective,
        combinations=counts,
        best=parents[0],
    )
    return SearchResult(tuple(plans), {plan.name: scores[plan.units] for plan in plans}, record)


def _best(
    candidates: Iterable[Units], scores: Mapping[Units, StateScores], search: Search, languages: Sequence[str]
) -> list[Units]:
    """Return the sets with the least damage. KL is defined for collapsed states, too."""
    objective = find_objective(search.objective)
    order = sorted(candidates, key=lambda subset: (objective.of_scores(scores[subset], languages), subset))
    return order[: search.survivors]


def _with_one_more(subset: Units, units: Units) -> list[Units]:
    return [tuple(u for u in units if u in subset or u == new) for new in units if new not in subset]


def _without_one(subset: Units, units: Units) -> list[Units]:
    return [tuple(unit for unit in subset if unit != old) for old in subset]
