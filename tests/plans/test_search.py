from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import Combinations, SearchMethod, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import Plan
from quant_fairness_plugin.plans.search import Search, SearchResult, Units, search_sets
from tests.planted import LANGUAGES, state

UNITS = tuple(f"layers.{i}" for i in range(6))
HARM = {"layers.0": 0.3, "layers.1": 0.5, "layers.2": 2.0, "layers.3": 1.2, "layers.4": 1.1, "layers.5": 0.1}
METHODS: tuple[SearchMethod, ...] = ("greedy", "backward", "beam")


def damage(chosen: Units, synergy: float = 0.0) -> float:
    """What the units that are not protected do; layers 0 and 1 together are worth `synergy` more than the sum."""
    both = {"layers.0", "layers.1"} <= set(chosen)
    return 9.0 + sum(harm for unit, harm in HARM.items() if unit not in chosen) - both * synergy


class Model:
    """Scores sets of units, and remembers which it was asked for together."""

    def __init__(self, synergy: float = 0.0, hurt: str = "he") -> None:
        self.synergy, self.hurt, self.asked = synergy, hurt, list[list[Units]]()

    def scores(self, chosen: Units) -> StateScores:
        harm = dict.fromkeys(LANGUAGES, 0.01) | {self.hurt: damage(chosen, self.synergy)}
        return state(str(chosen), harm, noise=0.0)

    def __call__(self, plans: Sequence[Plan]) -> Mapping[str, StateScores]:
        self.asked.append([plan.units for plan in plans])
        return {plan.name: self.scores(plan.units) for plan in plans}

    def search(self, search: Search, *, known: Sequence[Units] = (), **options: Any) -> SearchResult:
        start = {units: self.scores(units) for units in (*((unit,) for unit in UNITS), *known)}
        return search_sets(search, UNITS, start, self, languages=LANGUAGES, **options)


@pytest.mark.parametrize("method", METHODS)
def test_independent_units_are_found_by_every_method(method: SearchMethod) -> None:
    found = Model().search(Search(method=method, size=3))
    assert found.record.best == ("layers.2", "layers.3", "layers.4")
    assert set(found.scores) == {plan.name for plan in found.plans}
    assert all(plan.keeps_16_bit for plan in found.plans)


def test_each_generation_is_one_walk() -> None:
    model = Model()
    found = model.search(Search(method="greedy", size=3))
    assert [len(generation) for generation in model.asked] == [5, 4]
    assert all("layers.2" in chosen for chosen in model.asked[0])
    assert found.record.combinations == {
        2: Combinations(evaluated=5, possible=15),
        3: Combinations(evaluated=4, possible=20),
    }
    assert found.record.coverage == Combinations(evaluated=9, possible=35)
    assert found.record.width == 1


def test_backward_starts_from_all_and_gives_up_one_at_a_time() -> None:
    model = Model()
    found = model.search(Search(method="backward", size=3))
    assert [len(generation) for generation in model.asked] == [6, 5, 4]
    assert [len(generation[0]) for generation in model.asked] == [5, 4, 3]
    assert list(found.record.combinations) == [5, 4, 3]


def test_units_that_act_together_are_found_by_a_beam_that_is_wide_enough() -> None:
    """Alone, layers 0 and 1 come fourth and fifth: a greedy search never looks at them together."""
    best = min(combinations(UNITS, 2), key=lambda chosen: damage(chosen, synergy=5.0))
    assert best == ("layers.0", "layers.1")
    assert Model(synergy=5.0).search(Search(method="greedy", size=2)).record.best != best
    assert Model(synergy=5.0).search(Search(method="beam", size=2, width=3)).record.best != best
    assert Model(synergy=5.0).search(Search(method="beam", size=2, width=4)).record.best == best


def test_sets_that_are_known_are_compared_and_not_evaluated_again() -> None:
    model = Model(synergy=5.0)
    found = model.search(Search(method="greedy", size=3), known=list(combinations(UNITS, 2)))
    assert [len(generation) for generation in model.asked] == [4]
    assert found.record.combinations[2] == Combinations(evaluated=15, possible=15)
    assert found.record.best == ("layers.0", "layers.1", "layers.2")


def test_no_walk_has_more_plans_than_allowed() -> None:
    model = Model()
    limited = model.search(Search(method="beam", size=3, width=2), most=4)
    assert max(len(walk) for walk in model.asked) == 4
    assert limited.record == Model().search(Search(method="beam", size=3, width=2)).record


def test_sets_are_compared_by_the_worst_language_or_by_the_mean() -> None:
    """Protecting layer 0 helps one language much, layer 1 helps all a little."""

    def evaluate(plans: Sequence[Plan]) -> dict[str, StateScores]:
        return {plan.name: harmed(plan.units) for plan in plans}

    def harmed(chosen: Units) -> StateScores:
        harm = {"en": 3.0, "he": 4.0, "zh": 3.0}
        if "layers.0" in chosen:
            harm["he"] = 3.1
        if "layers.1" in chosen:
            harm = {language: value - 0.5 for language, value in harm.items()}
        return state("", harm, noise=0.0)

    units = UNITS[:4]
    known: dict[Units, StateScores] = {(unit,): harmed((unit,)) for unit in units}
    for objective, first in (("worst", "layers.0"), ("mean", "layers.1")):
        search = Search(method="greedy", size=2, objective=objective)
        plans = search_sets(search, units, known, evaluate, languages=LANGUAGES).plans
        assert all(first in plan.units for plan in plans)


def test_languages_that_do_not_count_do_not_decide() -> None:
    model = Model(hurt="zh")
    start: dict[Units, StateScores] = {(unit,): model.scores((unit,)) for unit in UNITS}
    found = search_sets(Search(method="greedy", size=2), UNITS, start, model, languages=("en", "he"))
    assert found.record.best == ("layers.0", "layers.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "search 'random' is unknown; use greedy, backward, beam"),
        ({"size": 1}, "use a size of 2 or more"),
        ({"width": 0}, "a width of 1 or more"),
        ({"objective": "disparity"}, "cannot be searched by 'disparity'; use objective worst or mean"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Search(**{"method": "greedy"} | options)


def test_a_set_of_all_units_is_refused() -> None:
    Search(method="beam", size=5).check(6)
    with pytest.raises(ConfigError, match="a search for 6 of 6 units leaves none quantized"):
        Search(method="beam", size=6).check(6)
