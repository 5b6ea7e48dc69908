from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quant_fairness_plugin.artifacts import Bootstrap, Granularity, Grid, Mode
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.forecast import Forecast, forecast, speed
from quant_fairness_plugin.forecast.passes import Range, Text, unit_map
from quant_fairness_plugin.forecast.report import forecast_lines
from quant_fairness_plugin.forecast.work import count_work
from quant_fairness_plugin.measure.rows import tokenize
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.plans.tree import State, build_tree
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT
from tests.planted_model import LAYERS, planted_texts
from tests.tiny import FAMILIES

GRID = Grid(group_size=32)
BOTH: tuple[Mode, ...] = ("protect-one", "quantize-one")


def predict(folder: Path, **settings: Any) -> Forecast:
    config = make_config(group_size=32, protect_layers=settings.pop("protect_layers", "none"))
    budget = settings.pop("memory_budget", None)
    plans = SweepConfig(**settings)
    return forecast(resolve_model(str(folder)), planted_texts(), config, plans, memory_budget=budget)


def passes_of_a_sweep(
    folder: Path, *, modes: tuple[Mode, ...], granularity: Granularity, combine: int, max_plans: int
) -> list[int]:
    """What a real sweep counts in each of its walks."""
    walks: list[int] = []

    def note(done: int, total: int) -> None:
        if done == total:
            walks.append(total)

    plans = SweepConfig(modes=modes, granularity=granularity, combine=combine, max_plans=max_plans, top=1)
    loaded, texts = load_model(str(folder)), planted_texts().part("search")
    sweep_units(loaded, texts, plans, grid=GRID, bootstrap=Bootstrap(draws=100), progress=note)
    return walks


@pytest.mark.parametrize(
    ("modes", "granularity", "combine"),
    [(("protect-one",), "layer", 1), (BOTH, "layer", 2), (("quantize-one",), "unit", 1)],
)
def test_passes_are_those_that_a_sweep_counts(
    modes: tuple[Mode, ...], granularity: Granularity, combine: int, planted_model: Path
) -> None:
    found = predict(planted_model, modes=modes, granularity=granularity, combine=combine)
    walks = passes_of_a_sweep(planted_model, modes=modes, granularity=granularity, combine=combine, max_plans=512)
    batches = len(found.text.batches)
    assert found.least == found.most
    assert [batches * passes for passes in found.most.batch_passes[1:]] == walks
    assert found.most.block_passes == sum(walks) + batches * LAYERS  # the walk that finds the supported languages


def test_passes_of_leading_sets_lie_between_both_ends(planted_model: Path) -> None:
    found = predict(planted_model, granularity="unit", combine=2, max_plans=12)
    walks = passes_of_a_sweep(planted_model, modes=("protect-one",), granularity="unit", combine=2, max_plans=12)
    batches = len(found.text.batches)
    assert found.least.block_passes < found.most.block_passes
    assert found.least.block_passes <= sum(walks) + batches * LAYERS <= found.most.block_passes


def test_text_is_what_the_loaded_tokenizer_makes_of_it(planted_model: Path) -> None:
    loaded, texts = load_model(str(planted_model)), planted_texts().part("search")
    batches = tokenize(loaded.tokenizer, texts, context=CONTEXT).batches(BATCH_TOKENS)
    text = predict(planted_model).text
    assert text.scored == sum(len(batch.targets) for batch in batches)
    assert text.padded == sum(batch.ids.numel() for batch in batches)
    assert len(text.batches) == len(batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_and_bytes_are_those_of_the_loaded_model(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, width=64)
    loaded, outline = load_model(str(folder)), outline_model(resolve_model(str(folder)))
    expected, other = count_bytes(loaded, GRID)
    table, rest = count_bytes(outline, GRID)
    assert table == {kind: expected[kind] for kind in table}
    assert rest == other
    named, mapped = unit_map(outline), map_units(loaded)
    assert (named.stages, named.groups) == (mapped.stages, mapped.groups)
    assert {u: set(p) for u, p in named.parameters.items()} == {u: set(p) for u, p in mapped.parameters.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_arithmetic_is_what_torch_counts(family: str, tiny_model: Callable[..., Path]) -> None:
    """One state over one batch: torch's own counter on a whole forward pass."""
    folder = tiny_model(family, width=64)
    loaded, outline = load_model(str(folder)), outline_model(resolve_model(str(folder)))
    loaded.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loaded.model(input_ids=torch.ones(3, 17, dtype=torch.long), use_cache=False)
    text = Text(sentences=3, languages=1, scored=3 * 17, batches=((3, 17, 3 * 17),))
    work = count_work(outline, (), [build_tree([State("16 bit", {})], unit_map(outline).stages)], text)
    head = 2 * 3 * 17 * outline.vocabulary * outline.width
    assert work.flops - head == pytest.approx(counter.get_total_flops(), rel=0.02)  # rotary tables, which are tiny


def test_time_is_measured_and_never_known(planted_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.Shared, "factor", 1.0)
    monkeypatch.setattr(speed, "timed", lambda call: Range(1.0, 3.0))
    slow = predict(planted_model)
    monkeypatch.setattr(speed, "timed", lambda call: Range(0.5, 0.5))
    fast = predict(planted_model)
    assert slow.seconds.high == pytest.approx(3 * slow.seconds.low)
    assert slow.seconds.low == pytest.approx(2 * fast.seconds.low)


def test_other_work_on_the_machine_lengthens_everything_alike(
    planted_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "timed", lambda call: Range(1.0, 3.0))
    monkeypatch.setattr(speed.Shared, "factor", 1.0)
    alone = predict(planted_model)
    monkeypatch.setattr(speed.Shared, "factor", 2.5)
    shared = predict(planted_model)
    assert shared.seconds.low == pytest.approx(2.5 * alone.seconds.low)
    assert shared.speed.flops.high == pytest.approx(alone.speed.flops.high / 2.5)
    said = "2.5 times as long as on a machine of its own"
    assert sum(said in line for line in forecast_lines(shared)) == 2
    assert not any(said in line for line in forecast_lines(alone))


def test_a_shared_processor_is_seen_and_too_short_a_look_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"perf_counter": 10.0, "thread_time": 5.0}
    for name in now:
        monkeypatch.setattr(speed.time, name, lambda name=name: now[name])
    for passed, computed, factor in ((3.0, 1.2, 2.5), (1.0, 1.1, 1.0), (1.0, 0.01, 1.0)):
        with speed.counting() as shared:
            now["perf_counter"] += passed
            now["thread_time"] += computed
        assert shared.factor == pytest.approx(factor)

    def computing() -> None:
        now["perf_counter"] += 7.0
        now["thread_time"] += 2.0

    found = speed.timed(computing)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_a_longer_sweep_is_forecast_to_take_longer(planted_model: Path) -> None:
    once, pairs = predict(planted_model), predict(planted_model, combine=2)
    assert pairs.plans > once.plans
    assert pairs.most.flops > once.most.flops
    assert pairs.memory.states > once.memory.states
    assert once.memory.weights == 4 * once.parameters


def test_what_does_not_fit_the_budget_is_spilled(planted_model: Path) -> None:
    free = predict(planted_model).streamed
    budget = free.peak - 1000
    tight = predict(planted_model, memory_budget=budget).streamed
    assert free.spilled == 0
    assert (tight.spilled, tight.peak) == (1000, budget)


def test_readers_that_will_not_load_it_are_named_with_the_reason(tiny_model: Callable[..., Path]) -> None:
    files = resolve_model(str(tiny_model("gpt2")))
    config = make_config(group_size=32, protect_layers=(1,))
    found = forecast(files, planted_texts(), config)
    reasons = {(one.format, one.reader): one.reason for one in found.readers}
    assert "Conv1D" in reasons["gptq", "transformers"]
    assert reasons["gptq", "vllm"] == ""
    assert reasons["fp16-twin", "transformers"] == ""
    assert found.disk.quantized < found.disk.plan < found.disk.sixteen_bit


def test_a_layer_that_the_model_lacks_is_refused(planted_model: Path) -> None:
    with pytest.raises(InvalidLayerError, match="layer 9 does not exist"):
        predict(planted_model, protect_layers=(9,))


def test_a_grid_that_fits_nothing_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="fits no module"):
        forecast(
            resolve_model(str(tiny_model(width=40))),
            planted_texts(),
            make_config(group_size=128, protect_layers="none"),
        )


def test_the_words_say_what_is_counted_and_what_is_estimated(planted_model: Path) -> None:
    found = predict(planted_model)
    text = "\n".join(forecast_lines(found))
    assert f"{found.plans} plans; {found.most.block_passes:,} block passes" in text
    assert "an estimate" in text
    uncertain = replace(found, least=replace(found.least, block_passes=7))
    assert f"7 to {found.most.block_passes:,} block passes" in "\n".join(forecast_lines(uncertain))
