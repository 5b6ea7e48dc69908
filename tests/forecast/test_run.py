"""What a whole run takes, against what real steps count."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.forecast import Forecast, forecast
from quant_fairness_plugin.forecast import run as module
from quant_fairness_plugin.forecast.passes import Range, Text
from quant_fairness_plugin.forecast.report import forecast_lines
from quant_fairness_plugin.forecast.run import PROMPT_TOKENS, STATES, Run
from quant_fairness_plugin.forecast.solving import MOST_COLUMNS, Solving, measure_solving
from quant_fairness_plugin.forecast.speed import Shared, Speed
from quant_fairness_plugin.forecast.starting import start_seconds
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.preflight import ModelSource
from tests.planted_model import LAYERS, planted_texts

NOTHING, ONE, BOUNDLESS = Range(0.0, 0.0), Range(1.0, 1.0), Range(math.inf, math.inf)
BLOCKS_ALONE = Speed(ONE, NOTHING, NOTHING, NOTHING, BOUNDLESS, 1, 0.0)
"""A token through a block takes a second, and nothing else takes any time."""
FREE = Solving(dict.fromkeys((32, 64, 128), NOTHING), dict.fromkeys((32, 64, 128), NOTHING))


@pytest.fixture
def config(planted_file: str) -> FairConfig:
    return FairConfig(texts=planted_file, group_size=32, prompts="none")


def run_of(folder: Path, config: FairConfig, **changes: Any) -> Run:
    text = Text(sentences=36, languages=2, scored=100, batches=((3, 40, 100),))
    run = Run(
        outline=outline_model(resolve_model(str(folder))), config=config, languages=("en", "he"), calibrated=500,
        search=text, confirm=text, speed=BLOCKS_ALONE,
    )  # fmt: skip
    return replace(run, **changes)


def seconds(run: Run, monkeypatch: pytest.MonkeyPatch, *, planned: bool = True) -> dict[str, Range]:
    monkeypatch.setattr(module, "measure_solving", lambda *_: FREE)
    steps = run.steps(run.once(), planned=planned)
    assert not isinstance(steps, Undefined)
    return {step.name: step.seconds for step in steps}


def test_a_quantization_sends_as_many_tokens_through_the_blocks_as_a_real_one(
    planted_model: Path, config: FairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are weights that a token meets, in blocks."""
    quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), replace(config, protect_layers="none"))
    loaded, met = quantizer.loaded, [0] * LAYERS
    for layer in range(LAYERS):
        for linear in loaded.linears(layer).values():

            def count(linear: Any, given: tuple[torch.Tensor, ...], _: Any, layer: int = layer) -> None:
                met[layer] += given[0].shape[:-1].numel() * linear.weight.numel()

            linear.register_forward_hook(count)
    calibrated = quantizer.quantize().calibration.coverage
    block = sum(linear.weight.numel() for linear in loaded.linears(0).values())
    run = run_of(planted_model, config, calibrated=sum(calibrated.values()))
    twice = seconds(run, monkeypatch)["quantize twice"]
    # Behind the last block nothing is calibrated, which is not sent through it; a pass in front of GPTQ looks at the
    # range of activations of a float16 model, on some tokens.
    last = sum(calibrated.values())
    assert twice.low == twice.high
    assert twice.low / 2 - last == pytest.approx(sum(met) / block, rel=0.1)


def test_texts_go_through_blocks_as_often_as_there_are_states(
    planted_model: Path, config: FairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seconds(run_of(planted_model, config), monkeypatch)
    assert found["measure"] == Range(STATES * 120 * LAYERS, STATES * 120 * LAYERS)
    # 36 sentences: the search part once, a third of it forward, back (3 times as much) and along INT4 and INT8.
    assert found["score"].low == pytest.approx(120 * LAYERS * (1 + 12 / 36 * (1 + 3 + 2)))
    assert found["try plans"].low == pytest.approx(120 * LAYERS * 8 / 36 * 2)
    assert "prompts" not in found
    written = replace(BLOCKS_ALONE, few=ONE)
    asked = seconds(run_of(planted_model, replace(config, prompts="bundled"), speed=written), monkeypatch)
    assert asked["prompts"].low == 2 * 3 * 2 * (PROMPT_TOKENS + 32) * LAYERS  # states, prompts, languages


def test_without_a_plan_a_run_quantizes_once_and_measures_one_state_less(
    planted_model: Path, config: FairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(planted_model, config)
    planned, bare = seconds(run, monkeypatch), seconds(run, monkeypatch, planned=False)
    assert list(bare) == ["quantize", "write and verify", "measure"]
    assert bare["quantize"].times(2) == planned["quantize twice"]
    assert bare["measure"].times(STATES / (STATES - 1)).low == pytest.approx(planned["measure"].low)


def test_starting_is_counted_with_what_else_runs(
    planted_model: Path, config: FairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(planted_model, config, start=6.0, speed=replace(BLOCKS_ALONE, shared=2.0))
    for planned in (True, False):
        found = seconds(run, monkeypatch, planned=planned)
        assert next(iter(found)) == "start"
        assert found["start"] == Range(12.0, 12.0)


def test_a_fresh_python_is_started_once_to_see_how_long_that_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([SimpleNamespace(children_user=user, children_system=1.0) for user in (2.0, 7.0)])
    lines: list[list[str]] = []
    monkeypatch.setattr("quant_fairness_plugin.forecast.starting.os.times", lambda: next(times))
    monkeypatch.setattr("quant_fairness_plugin.forecast.starting.subprocess.run", lambda line, **_: lines.append(line))
    fresh = start_seconds.__wrapped__
    assert fresh() == 5.0
    assert lines == [[sys.executable, "-c", "import quant_fairness_plugin.fair_quantizer"]]


@pytest.mark.parametrize(
    ("settings", "known", "reason"),
    [
        ({"method": "awq"}, 500, "not that of awq"),
        ({}, None, "how much the calibration texts hold"),
    ],
)
def test_what_cannot_be_counted_is_not_forecast(
    settings: dict[str, Any], known: int | None, reason: str, planted_model: Path, config: FairConfig
) -> None:
    found = run_of(planted_model, replace(config, **settings), calibrated=known).once()
    assert isinstance(found, Undefined)
    assert reason in found.undefined


def test_the_forecast_counts_the_calibration_text_and_says_the_steps(planted_model: Path, config: FairConfig) -> None:
    def predict(**settings: Any) -> Forecast:
        return forecast(resolve_model(str(planted_model)), planted_texts(), replace(config, **settings))

    found = predict()
    [line] = [line for line in forecast_lines(found) if line.startswith("run  ")]
    assert "as it comes, with a plan by gradients" in line
    assert "quantize twice " in line
    [bare] = [line for line in forecast_lines(found) if "quantize --protect-layers none" in line]
    assert "without a plan" in bare
    assert not isinstance(found.run, Undefined)
    assert all(0 < step.seconds.low <= step.seconds.high for step in found.run)
    unknown = replace(found, run=Undefined("for a reason"))
    assert "run         how long it takes is not known: for a reason" in list(forecast_lines(unknown))


def test_calibration_tokens_are_those_of_a_real_run(
    planted_model: Path, config: FairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int | None] = []
    plain = Run.once

    def note(self: Run) -> Range | Undefined:
        counted.append(self.calibrated)
        return plain(self)

    monkeypatch.setattr(Run, "once", note)
    for settings in ({}, {"calibration": "english"}, {"tokens_per_language": 50}, {"calibration": "proportional"}):
        changed = replace(config, **settings)  # type: ignore[arg-type]
        forecast(resolve_model(str(planted_model)), planted_texts(), changed)
        quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), replace(changed, protect_layers="none"))
        real = quantizer.quantize().calibration.coverage
        assert counted[-1] == pytest.approx(sum(real.values()), rel=0.1)  # line ends and beginnings


def test_solving_is_timed_at_the_widths_of_the_model_and_grows_beyond_them(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, config: FairConfig
) -> None:
    outline = outline_model(resolve_model(str(tiny_model("llama", width=64))))
    seconds = iter([Range(1.0, 1.0), Range(8.0, 8.0)] * 9)
    monkeypatch.setattr("quant_fairness_plugin.forecast.solving.timed", lambda call, **_: next(seconds))
    monkeypatch.setattr("quant_fairness_plugin.forecast.solving.MOST_COLUMNS", 64)
    monkeypatch.setattr(Shared, "factor", 1.0)
    found = measure_solving(outline, config.grid, "normal")
    assert (found.matrix[64], found.row[64]) == (NOTHING, Range(7 / 224, 7 / 224))  # 32 rows in 1 s, 256 in 8 s
    wider = next(width for width in found.row if width > 64)
    assert found.row[wider].low == pytest.approx(7 / 224 * wider / 64)
    assert found.row[wider].high == pytest.approx(7 / 224 * (wider / 64) ** 2)
    assert found.of(10, 64).low == pytest.approx(10 * 7 / 224)
    assert MOST_COLUMNS % 128 == 0
