"""Sentences that are scored in a stated time, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.sweep.sampling import LEAST_SENTENCES, SearchTime, spread_places
from quant_fairness_plugin.sweep.search_time import Scored, score_in_time
from tests.planted_model import planted_texts

SECONDS = 3.0
"""That scoring a sentence takes."""


@dataclass
class Clock:
    """Scores sentences by their numbers, and takes pretended time."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def score(self, some: TextSet, seed: int) -> Scored:
        self.now += SECONDS * len(some)
        numbers = tuple(float(name.removeprefix("s")) for name in some.ids)
        return {"layers.0.o": {"int4": {"en": numbers}}}, {"en": tuple(int(number) + seed for number in numbers)}


def scored(
    time: str, *, wanted: int = 12, forecast: float | None = None, spent: float = 0.0
) -> tuple[list[float], float]:
    """The sentences that were scored, and what was left of the time."""
    clock, texts = Clock(), planted_texts().part("search")
    search = SearchTime(time, clock)
    search.whole_pass = forecast
    with search.counted():
        clock.now += spent
    clock.now += 1000  # outside, nothing counts
    with search.counted():
        scores, bytes_ = score_in_time(clock.score, texts, wanted, seed=0, search=search)
    found = scores["layers.0.o"]["int4"]["en"]
    assert len(bytes_["en"]) == len(found) == len(set(found))
    return list(found), search.left


def test_without_a_time_all_are_scored_together() -> None:
    texts = planted_texts().part("search")
    scores, bytes_ = score_in_time(Clock().score, texts, 12, seed=0, search=None)
    wanted = [float(texts.ids[i].removeprefix("s")) for i in spread_places(len(texts), 12)]
    assert list(scores["layers.0.o"]["int4"]["en"]) == wanted == [float(size) for size in bytes_["en"]]


def test_a_forecast_that_fits_changes_nothing() -> None:
    texts = planted_texts().part("search")
    wanted = [float(texts.ids[i].removeprefix("s")) for i in spread_places(len(texts), 12)]
    assert scored("1h", forecast=40.0) == (wanted, 3600 - 36)


@pytest.mark.parametrize("forecast", [None, 46.0])
def test_the_fewest_come_first_and_as_many_more_as_fit(forecast: float | None) -> None:
    found, left = scored("40s", forecast=forecast)  # three quarters of 40 s, at 3 s a sentence
    assert len(found) == 10
    assert left == 40 - 30
    texts = planted_texts().part("search")
    assert found[:4] == [float(texts.ids[i].removeprefix("s")) for i in spread_places(len(texts), LEAST_SENTENCES)]


def test_what_was_spent_before_counts_and_the_fewest_are_scored_all_the_same() -> None:
    assert len(scored("40s", spent=12.0)[0]) == 7
    found, left = scored("40s", spent=39.0)
    assert (len(found), left) == (LEAST_SENTENCES, 40 - 39 - 12)


def test_no_more_than_wanted_are_scored() -> None:
    assert len(scored("1h", wanted=3)[0]) == 3
    assert len(scored("1h", wanted=6)[0]) == 6
