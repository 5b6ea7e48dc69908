"""Plans of `auto`: on a mixture of experts, whose units have menus of their own, and in a stated time."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quant_fairness_plugin import planning, steps
from quant_fairness_plugin.artifacts import ProtectionPlan, from_json, to_json
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, QualityGateError, UnsupportedModelError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.forecast.passes import Range
from quant_fairness_plugin.model.load import from_loaded
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.workplace import Workplace
from quant_fairness_plugin.recommend.estimated import Candidate, Planner
from quant_fairness_plugin.sweep.sampling import SearchTime
from quant_fairness_plugin.texts.load import load_texts
from tests.planted_model import PLANTED_LAYER, write_planted_mixture
from tests.tiny import byte_tokenizer
from tests.traced import traced_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "planted"
    write_planted_mixture(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # the model's own code warns
def test_layers_that_share_more_than_a_hidden_state_are_refused_before_the_work() -> None:
    loaded = from_loaded(traced_model("gemma4_text"), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="keys and values from earlier ones.*Name the layers to protect"):
        planning.check_scorable(loaded)


def test_experts_are_scored_and_get_what_readers_take(mixture: Path, planted_file: str, tmp_path: Path) -> None:
    """Experts in 8 bits would be the cheapest remedy, which no reader takes: the planted ones keep 16 bit."""
    config = FairConfig(texts=planted_file, group_size=32, max_overhead=0.35, prompts="none")
    plans = []
    for place in (None, Workplace(memory_budget=1 << 26)):
        quantizer = FairQuantizer.from_source(ModelSource(str(mixture)), config, place=place)
        plans.append(quantizer.recommend())
    assert plans[0].overrides == plans[1].overrides
    assert plans[0].overrides[f"layers.{PLANTED_LAYER}.experts"] == "fp16"
    experts = {kind for unit, kind in plans[0].overrides.items() if unit.endswith(".experts")}
    assert experts == {"fp16"}
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.measurement is not None
    assert record.reader_run is not None


@dataclass
class Clock:
    """A clock that goes on when a pass over texts is finished: 10 s for scores, 5 s for exact evaluations."""

    now: float = 0.0
    said: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def tell(self, step: str, done: int, total: int) -> None:
        self.now += {"score": 10.0, "compare": 5.0}.get(step, 0.0) if done == total else 0.0
        if step.startswith("best plan so far"):
            self.said.append(step)


@pytest.fixture
def planned(planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProtectionPlan]:
    """Plan with a time on a pretended clock, without a forecast. What was said goes into a list."""
    monkeypatch.setattr("quant_fairness_plugin.steps.check_time", lambda *given, **named: None)

    def plan(said: list[str], **options: Any) -> ProtectionPlan:
        config = FairConfig(texts=planted_file, group_size=32, max_overhead=0.1, **options)
        clock = Clock(said=said)
        quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), config, progress=clock.tell)
        quantizer._clock = clock
        return quantizer.recommend()

    return plan


@pytest.fixture
def four_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plan have three neighbours, each with a unit in 8 bit that it leaves in 4."""
    plain = Planner.candidates

    def candidates(self: Planner) -> tuple[Candidate, ...]:
        first, others = plain(self)[0], ("layers.0.o", "layers.1.o", "layers.3.o")
        assert not set(others) & set(first.choice)
        more = [replace(first, name=unit, choice={**first.choice, unit: "int8"}) for unit in others]
        return (first, *more)

    monkeypatch.setattr(Planner, "candidates", candidates)


@pytest.mark.usefixtures("four_plans")
def test_a_search_stops_when_the_next_exact_plan_does_not_fit(planned: Callable[..., ProtectionPlan]) -> None:
    """Scores take 20 s: four sentences, 2.5 s each, then six more; the first exact plan is taken for 10 s."""
    said: list[str] = []
    assert planned(said, time="1h").reasons[-1] == "--time 1h cut nothing"
    assert len(said) == 5
    said.clear()
    plan = planned(said, time="34s")
    assert "stopped by --time 34s after 2 of 4 exact plans; best so far: INT8 for " in plan.reasons[-1]
    assert "measured worst" in plan.reasons[2]
    assert "predicted worst" in said[0]
    assert all("measured worst" in words for words in said[1:])
    assert len(said) == 3
    assert from_json(ProtectionPlan, to_json(plan), "plan") == plan


@pytest.mark.usefixtures("four_plans")
def test_fewer_sentences_and_no_exact_plan_are_said(planned: Callable[..., ProtectionPlan]) -> None:
    plan = planned([], time="15s")
    assert plan.reasons[-2] == "scored on 4 instead of 12 sentences a language by --time 15s"
    assert re.fullmatch(
        r"stopped by --time 15s after 0 of 4 exact plans; best so far: INT8 for .*, by prediction alone",
        plan.reasons[-1],
    )
    assert not any("measured" in reason for reason in plan.reasons)
    late = planned([], time="9s").reasons
    assert late[-1] == "the search took longer than --time 9s: what was begun was finished"


def test_the_sentences_of_a_search_are_those_that_were_asked_for(planned: Callable[..., ProtectionPlan]) -> None:
    said: list[str] = []
    plan = planned(said, sentences=3)
    assert "scored by one pass of gradients, 3 sentences a language" in plan.reasons[1]
    assert "on 3 search sentences a language" in plan.reasons[2]
    assert "cut" not in "".join(plan.reasons)
    assert [words.partition(";")[0] for words in said] == ["best plan so far: " + plan.reasons[0].partition(";")[0]]


def test_more_sentences_than_there_are_are_refused(planned: Callable[..., ProtectionPlan]) -> None:
    with pytest.raises(ConfigError, match="sentences 21: .* has 20 of each language to search for a plan on"):
        planned([], sentences=21)


def test_a_time_that_cannot_hold_the_least_is_refused_before_the_work(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast = SimpleNamespace(scored=lambda count: Range(5.0 * count, 10.0 * count))
    forecast.least = lambda count, *, quantizes: forecast.scored(count) + Range(20.0, 40.0).times(float(quantizes))
    monkeypatch.setattr("quant_fairness_plugin.steps.search.forecast_search", lambda *given: forecast)
    monkeypatch.setattr("quant_fairness_plugin.steps.quantize", lambda *given, **named: pytest.fail("quantized"))
    config = FairConfig(texts=planted_file, group_size=32, time="59s")
    quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), config)
    quantizer._clock = Clock()
    with pytest.raises(ConfigError, match=r"59s is too short: quantizing once .* about 60 s here \(40 to 80"):
        quantizer.recommend()
    search = SearchTime("59s", Clock())
    steps.check_time(quantizer.loaded, quantizer.texts, quantizer.config, search, quantizes=False)
    assert search.whole_pass == 120.0
    assert quantizer.protecting("none").config.time is None
    assert quantizer.protecting("auto").config.time == "59s"


def test_what_no_plan_keeps_is_refused_before_anything_is_quantized(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FairQuantizer, "_quantize", lambda *_: pytest.fail("quantized before the refusal"))
    for options, said in (
        ({"max_size": 1000}, "a budget of 1000 bytes is below the smallest checkpoint of this grid, [0-9]+ bytes"),
        ({"target_bits": 2.5}, "is below the smallest checkpoint of this grid"),
    ):
        wanted: Any = options
        quantizer = FairQuantizer.from_pretrained(str(planted_model), texts=planted_file, **wanted)
        with pytest.raises(QualityGateError, match=said):
            quantizer.recommend()


def test_languages_that_the_model_does_not_know_are_found_before_anything_is_quantized(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentences of noise are no language of the model's: alone they end the work, and so does a limit of theirs."""
    monkeypatch.setattr(FairQuantizer, "_quantize", lambda *_: pytest.fail("quantized before the refusal"))
    texts = load_texts(planted_file)
    first, second = texts.languages[:2]
    draw = random.Random(0)
    noise = tuple("".join(chr(draw.randrange(33, 127)) for _ in range(60)) for _ in range(len(texts)))
    mixed = replace(texts, sentences={first: texts.sentences[first], second: noise})
    for given, limits, kind, said in (
        (mixed.choose((second,)), None, QualityGateError, "supports none of"),
        (mixed, {second: 0.1}, ConfigError, f"limit of {second}: the 16-bit model supports none of {second}"),
        (mixed, {first: 9.0, second: 0.1}, ConfigError, f"limit of {second}: the 16-bit model supports none of"),
    ):
        quantizer = FairQuantizer.from_pretrained(
            str(planted_model), texts=given, limits=limits, reference=None, target="worst=0.1"
        )
        with pytest.raises(kind, match=said):
            quantizer.recommend()
