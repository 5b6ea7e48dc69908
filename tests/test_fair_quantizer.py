"""The eight steps in one go, on a tiny model whose damage is planted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quant_fairness_plugin import fair_quantizer, planning, preflight
from quant_fairness_plugin.artifacts import ExportRecord, Interval, ProtectionPlan, Ranking, load
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import (
    ArtifactError,
    ConfigError,
    InvalidLayerError,
    QualityGateError,
    ResourceError,
    UnsupportedModelError,
)
from quant_fairness_plugin.export import writer
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.model import load as load_module
from quant_fairness_plugin.model import resolve
from quant_fairness_plugin.model import streamed as streamed_module
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.workplace import Workplace
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.steps import plans
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.texts.load import load_texts
from tests.planted_model import LAYERS, PLANTED_LAYER, WORDS


@pytest.fixture(scope="module")
def quantizer(planted_model: Path, planted_file: str) -> FairQuantizer:
    return FairQuantizer.from_pretrained(
        str(planted_model), group_size=32, texts=planted_file, max_overhead=0.4, draws=200, precisions=("fp16",)
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "checkpoint"


@pytest.fixture(scope="module")
def result(quantizer: FairQuantizer, out: Path) -> RunResult:
    return quantizer.run(out)


def test_auto_protects_the_planted_layer_within_its_budget(result: RunResult) -> None:
    assert result.plan.protected_layers == (PLANTED_LAYER,)
    assert result.plan.overhead <= 0.4


def test_protection_helps_on_sentences_that_it_was_not_chosen_on(result: RunResult) -> None:
    assert isinstance(result.gain, Interval)
    assert result.gain.low > 0  # 0.66 of 0.74 bits per byte
    assert result.verdict.startswith("protection lowered the worst language's KL")
    assert [row.language for row in result.protected.languages] == list(WORDS)


def test_the_record_is_what_was_returned(result: RunResult, out: Path) -> None:
    record = load(ExportRecord, out / "quant_fairness.json")
    assert record == result.record
    assert (record.measurement, record.unprotected) == (result.protected, result.unprotected)
    assert record.plan == result.plan
    assert not record.plan.predicted


def test_the_measured_checkpoint_is_the_one_that_transformers_loads(result: RunResult, out: Path) -> None:
    ids = torch.tensor([[0, 5, 9, 33, 70, 101]])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = load_quantized(out, kernel="reference")
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids).logits).abs().max()
    assert difference < 1e-4  # float32 rounding of sums of 64 products of magnitude < 10


def test_the_model_is_unchanged_after_a_run(result: RunResult, quantizer: FairQuantizer, planted_model: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(planted_model, dtype=torch.float32)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, quantizer.loaded.model.get_parameter(name)), name


def test_the_same_run_writes_the_same_bytes(quantizer: FairQuantizer, result: RunResult, tmp_path: Path) -> None:
    again = FairQuantizer(quantizer.loaded, quantizer.texts, quantizer.config).run(tmp_path / "checkpoint")
    assert again.record.files == result.record.files
    assert again.record == result.record


def test_an_existing_output_is_refused_and_left_alone(quantizer: FairQuantizer, result: RunResult, out: Path) -> None:
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ConfigError, match="exists"):
        quantizer.save_pretrained(out)
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_failing_measurement_leaves_nothing_behind(quantizer: FairQuantizer, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantizer.save_pretrained(tmp_path / "checkpoint", measure=fail)  # type: ignore[arg-type] # never returns
    assert list(tmp_path.iterdir()) == []


def test_protecting_gives_another_plan_on_the_same_sweep(quantizer: FairQuantizer) -> None:
    assert quantizer.protecting([0, 3]).recommend().protected_layers == (0, 3)
    assert quantizer.protecting("none").recommend().protected_layers == ()
    assert quantizer.protecting("auto").sweep() is quantizer.sweep()


def test_a_sweep_of_another_mode_is_not_answered_with_the_first(quantizer: FairQuantizer) -> None:
    both = quantizer.protecting("auto")
    assert "quantize 0" in both.sweep(("protect-one", "quantize-one")).scores
    assert both.sweep(("quantize-one",)) is both.sweep()


def test_a_sweep_with_fewer_plans_is_not_the_answer(quantizer: FairQuantizer) -> None:
    other = quantizer.protecting("auto")
    pairs = other.sweep(combine=2)
    assert pairs.combinations[2].evaluated == 6
    assert other.sweep() is pairs
    assert other.sweep(combine=2, max_plans=3).combinations[2].evaluated == 3
    assert other.sweep(combine=2, top=2).rankings["protect-one worst"].top == 2  # type: ignore[union-attr] # is ranked


def test_a_sweep_without_the_search_or_precision_is_not_the_answer(quantizer: FairQuantizer) -> None:
    other = quantizer.protecting("auto")
    plain = other.sweep()
    mixed = other.sweep(precisions=("fp16", "int8"))
    assert mixed is not plain
    assert other.sweep() is mixed
    searched = other.sweep(precisions=("fp16", "int8"), search=Search(method="greedy", size=2))
    assert searched.search is not None
    assert other.sweep(search=Search(method="greedy", size=3)) is not searched


def test_a_sweep_of_two_precisions_ends_in_a_checkpoint_with_8_bit_layers(
    quantizer: FairQuantizer, tmp_path: Path
) -> None:
    config = replace(quantizer.config, method="rtn", max_overhead=0.1)
    other = FairQuantizer(quantizer.loaded, quantizer.texts, config)
    other.sweep(precisions=("fp16", "int8"))
    plan = other.recommend()
    assert "int8" in plan.overrides.values()
    record = other.save_pretrained(tmp_path / "checkpoint", measure=None)
    assert 8 in record.quantized_modules.values()
    assert record.plan == plan


def test_a_sweep_of_units_ends_in_a_checkpoint_with_units_of_its_own(quantizer: FairQuantizer, tmp_path: Path) -> None:
    config = replace(quantizer.config, method="rtn", top=2)
    other = FairQuantizer(quantizer.loaded, quantizer.texts, config)
    other.sweep(granularity="unit")
    plan = other.recommend()
    assert plan.protected_layers == ()
    assert f"layers.{PLANTED_LAYER}.down" in plan.overrides
    assert len(plan.overrides) == 2
    record = other.save_pretrained(tmp_path / "checkpoint", measure=None)
    kept = {name for layer in range(LAYERS) for name in other.loaded.linears(layer)} - set(record.quantized_modules)
    groups = {unit.name: unit.modules for unit in other.loaded.family.units}
    places = [name.split(".") for name in plan.overrides]
    assert kept == {f"model.layers.{layer}.{module}" for _, layer, group in places for module in groups[group]}


def test_auto_chooses_from_the_configured_precisions(planted_model: Path, planted_file: str) -> None:
    quantizer = FairQuantizer.from_pretrained(
        str(planted_model), group_size=32, texts=planted_file, precisions=("fp16", "int8"), max_overhead=0.25, draws=200
    )
    assert quantizer.sweep(precisions=("fp16", "int8")).precisions == ("fp16", "int8")
    plan = quantizer.recommend()
    # It leaves 0.0947 bits per byte, 16 bit 0.0945: the bytes saved buy 0.01 with another layer.
    assert plan.units[f"layers.{PLANTED_LAYER}"] == "int8"


@pytest.fixture(scope="module")
def scored(planted_model: Path, planted_file: str) -> FairQuantizer:
    return FairQuantizer.from_pretrained(
        str(planted_model), group_size=32, texts=planted_file, max_overhead=0.1, draws=200
    )


def test_auto_gives_the_planted_unit_eight_bits_by_scores(
    scored: FairQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.work.sweep_units", lambda *a, **k: pytest.fail("swept"))
    result = scored.run(tmp_path / "out")
    assert result.plan.overrides[f"layers.{PLANTED_LAYER}.down"] == "int8"
    assert result.plan.overhead <= 0.1
    assert result.record.quantized_modules[f"model.layers.{PLANTED_LAYER}.mlp.down_proj"] == 8
    assert isinstance(result.gain, Interval)
    assert result.gain.low > 0  # the planted unit alone does nine tenths of the damage
    assert result.verdict.startswith("protection lowered")
    assert re.match(
        r"INT8 for .*2\.down.*; the rest INT4 g32; predicted worst \S+ bits per byte", result.plan.reasons[0]
    )
    assert "measured worst" in result.plan.reasons[2]


def test_plans_for_other_limits_come_from_the_same_scores(scored: FairQuantizer) -> None:
    scores = scored.score()
    assert scored.score() is scores
    small, large = (plan_under(scored, max_overhead=share) for share in (0.05, 0.4))
    assert small.extra_bytes < large.extra_bytes
    floor = round(small.extra_bytes / small.overhead)
    assert plan_under(scored, max_size=floor + small.extra_bytes).units == small.units
    assert plan_under(scored, target_bits=4.5).overrides == {}  # 4 bits and a scale of 16 for every 32
    with pytest.raises(QualityGateError, match="the smallest allocation takes"):
        plan_under(scored, target_bits=4.4)
    assert set(plan_under(scored, target_bits=16.0).overrides.values()) <= {"int8", "fp16"}
    reached = plan_under(scored, target="worst=0.001")
    assert 0 < reached.extra_bytes < large.extra_bytes


def plan_under(scored: FairQuantizer, **options: Any) -> ProtectionPlan:
    other = FairQuantizer(scored.loaded, scored.texts, replace(scored.config, **options))
    return other.recommend(scored.score())


def test_exhaustive_sweeps_every_unit_at_every_precision(
    scored: FairQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored.score()
    monkeypatch.setattr("quant_fairness_plugin.planning.score", lambda *a, **k: pytest.fail("scored"))
    config = replace(scored.config, exhaustive=True)
    other = FairQuantizer(scored.loaded, scored.texts, config)
    plan = other.recommend()
    report = other.sweep(granularity="unit", precisions=("fp16", "int8"))
    assert set(report.units) == set(scored.score().units)
    assert plan.overrides[f"layers.{PLANTED_LAYER}.down"] == "int8"


def test_what_the_reader_cannot_load_is_left_out_of_the_menu(scored: FairQuantizer) -> None:
    assert planning.menu_of(scored.loaded, scored.config) == (("fp16", "int8"), False)
    config = replace(scored.config, format="gptq")
    assert planning.menu_of(scored.loaded, config) == (("fp16",), False)


def test_precisions_that_the_reader_cannot_load_are_refused_before_the_sweep(
    planted_model: Path, planted_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.work.sweep_units", lambda *_, **__: pytest.fail("it was swept"))
    given: dict[str, Any] = {"texts": planted_file, "group_size": 32, "format": "gptq"}
    quantizer = FairQuantizer.from_pretrained(str(planted_model), precisions=("fp16", "int8"), **given)
    with pytest.raises(UnsupportedModelError, match="8"):
        quantizer.save_pretrained(tmp_path / "out")


def test_a_sweep_in_bfloat16_says_so_and_finds_the_planted_layer(planted_model: Path, planted_file: str) -> None:
    config = make_config(group_size=32, texts=planted_file, draws=200, dtype="bfloat16", device="cpu")
    quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), config)
    report = quantizer.sweep(top=1)
    assert (report.provenance.device, report.provenance.dtype) == ("cpu", "bfloat16")
    with pytest.raises(ConfigError, match="bfloat16 rounds the float16 weights of .* Use --dtype float32"):
        quantizer.protecting("none").quantize()
    assert quantizer.loaded.model.dtype == torch.bfloat16
    assert report.provenance.arguments["dtype"] == "bfloat16"
    ranking = report.rankings["protect-one worst"]
    assert isinstance(ranking, Ranking)
    assert ranking.layers[0] == PLANTED_LAYER  # saves 1.5 bits per byte, the next layer 0.07


def test_a_device_that_is_not_here_is_refused_before_the_weights_are_read(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.opening.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=r"device cuda:97 is not here; torch finds .*cpu\. Use one of these"):
        FairQuantizer.from_pretrained(str(planted_model), texts=planted_file, device="cuda:97")


def test_the_model_goes_to_the_device_of_the_configuration(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> None:
        given.update(options)
        raise ConfigError("stop here")

    monkeypatch.setattr("quant_fairness_plugin.steps.opening.load_model", record)
    monkeypatch.setattr("quant_fairness_plugin.steps.opening.find_device", lambda name: f"{name}:0")
    with pytest.raises(ConfigError, match="stop here"):
        FairQuantizer.from_pretrained(str(planted_model), texts=planted_file, device="cuda")
    assert (given["device"], given["dtype"]) == ("cuda:0", torch.float32)  # its weights are stored in float16


def test_a_model_in_memory_is_computed_in_float32(planted_model: Path, planted_file: str) -> None:
    pair = in_memory(planted_model)
    with pytest.raises(ConfigError, match="dtype bfloat16 is accepted together with a model's name"):
        FairQuantizer.from_pretrained(**pair, texts=planted_file, dtype="bfloat16")
    with pytest.raises(ConfigError, match="device cuda:97 is not here"):
        FairQuantizer.from_pretrained(**pair, texts=planted_file, device="cuda:97")
    loaded = FairQuantizer.from_pretrained(**pair, texts=planted_file, device="cpu").loaded
    assert (loaded.model.device.type, loaded.model.dtype) == ("cpu", torch.float32)


def test_group_sizes_of_a_model_and_of_a_plan(tiny_model: Callable[..., Path], planted_file: str) -> None:
    """Of width 96 `down` has 192 input channels, so groups of 64, and all else groups of 32."""
    folder = str(tiny_model(width=96))
    given: dict[str, Any] = {"texts": planted_file, "protect_layers": "none"}
    with pytest.raises(ConfigError, match="group size 64 does not divide .* 6 of 8 units.* would take 32"):
        FairQuantizer.from_pretrained(folder, group_size=64, strict=True, **given)
    assert FairQuantizer.from_pretrained(folder, **given).config.grid.group_size == 32
    plan = FairQuantizer.from_pretrained(folder, group_size=64, **given).recommend()
    assert plan.grid.group_size == 64
    uniform = FairQuantizer.from_pretrained(folder, method="awq", symmetric=True, format="awq", **given)
    assert uniform.config.grid.group_size == 32
    with pytest.raises(UnsupportedModelError, match="holds one group size.*--group-size 32 for a plan of one size"):
        uniform.following(plan)


def test_a_model_that_stays_in_its_files_goes_the_whole_line_to_the_same_checkpoint(
    quantizer: FairQuantizer, planted_model: Path, tmp_path: Path
) -> None:
    config = replace(quantizer.config, protect_layers=(PLANTED_LAYER,))
    whole = FairQuantizer(quantizer.loaded, quantizer.texts, config).run(tmp_path / "whole")
    place = Workplace(tmp_path / "work", memory_budget=10**9)
    streamed = FairQuantizer.from_source(ModelSource(str(planted_model)), config, place=place)
    found = streamed.run(tmp_path / "streamed")
    weights = "model.safetensors"
    assert found.record.files[weights] == whole.record.files[weights]
    for ours, theirs in ((found.protected, whole.protected), (found.unprotected, whole.unprotected)):
        for row, expected in zip(ours.languages, theirs.languages, strict=True):
            # float32 sums in another order: 1e-5 nats a token.
            assert row.kl_bits_per_byte.estimate == pytest.approx(expected.kl_bits_per_byte.estimate, abs=1e-4)
            assert row.status == expected.status
    with pytest.raises(ConfigError, match="block by block.*Open it without a memory budget"):
        streamed.evidence(found.plan)


def test_the_plan_of_auto_is_the_same_with_one_block_in_memory(quantizer: FairQuantizer, planted_model: Path) -> None:
    config = replace(quantizer.config, protect_layers="auto", precisions=None, top=None, max_overhead=0.2)
    whole = FairQuantizer(quantizer.loaded, quantizer.texts, config).recommend()
    source, place = ModelSource(str(planted_model)), Workplace(memory_budget=10**9)
    streamed = FairQuantizer.from_source(source, config, place=place)
    assert any(parameter.is_meta for parameter in streamed.loaded.model.parameters())
    assert streamed.recommend() == whole
    assert whole.overrides
    with pytest.raises(ResourceError, match="memory budget 1.00 KB: one block in every precision"):
        planning.score(replace(streamed.loaded, memory_budget=1000), quantizer.texts, config, _bank(streamed))


def _bank(quantizer: FairQuantizer) -> Bank:
    return planning.scoring_bank(quantizer.loaded, quantizer.config, None)


def test_evidence_is_of_the_confirm_part_and_of_the_plan(quantizer: FairQuantizer, result: RunResult) -> None:
    evidence = quantizer.evidence()
    assert evidence.plan == quantizer.recommend()
    assert set(evidence.languages) == set(WORDS)
    worst = evidence.row("the plan").worst
    assert isinstance(worst, Interval)
    assert evidence.provenance.text_sha256 == result.record.provenance.text_sha256


def test_a_wrong_layer_fails_before_the_weights_are_read(planted_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.opening.load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InvalidLayerError, match=f"layer {LAYERS} does not exist"):
        FairQuantizer.from_pretrained(str(planted_model), protect_layers=[LAYERS])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "gptq", "symmetric": False}, "symmetric"), ({"bits": 3}, "checkpoints of 3 bits")],
)
def test_what_no_reader_loads_is_refused_before_anything_is_quantized(
    quantizer: FairQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.work.quantize_model", lambda *a, **k: pytest.fail("quantized"))
    monkeypatch.setattr("quant_fairness_plugin.steps.work.sweep_units", lambda *a, **k: pytest.fail("swept"))
    other = FairQuantizer(quantizer.loaded, quantizer.texts, replace(quantizer.config, **options))
    with pytest.raises(UnsupportedModelError, match=message):
        other.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedModelError, match=message):
        other.run(tmp_path / "checkpoint")


def test_columns_are_paid_measured_and_not_in_the_model_to_compare_with(
    quantizer: FairQuantizer, result: RunResult, tmp_path: Path
) -> None:
    config = replace(quantizer.config, protect_layers="none", protect_columns=0.1)
    ran = FairQuantizer(quantizer.loaded, quantizer.texts, config).run(tmp_path / "out")
    assert ran.plan.protect_columns == 0.1
    assert ran.plan.overhead > 0
    assert ran.record.protected_columns.keys() == ran.record.quantized_modules.keys()
    assert ran.unprotected.languages == result.unprotected.languages
    assert ran.protected.worst_kl != ran.unprotected.worst_kl


@pytest.fixture
def streamed(planted_model: Path, planted_file: str) -> FairQuantizer:
    config = make_config(group_size=32, texts=planted_file, draws=200, max_overhead=0.4)
    return FairQuantizer.from_source(ModelSource(str(planted_model)), config, place=Workplace(memory_budget=10**9))


def test_a_copy_of_a_model_that_stays_in_its_files_can_be_swept(streamed: FairQuantizer) -> None:
    plan = streamed.recommend()
    report = streamed.sweep()
    for other in (streamed.protecting("auto"), streamed.protecting([0]), streamed.following(plan)):
        assert other.sweep() is report
        assert other.sweep(combine=2, max_plans=3).combinations[2].evaluated == 3
        with pytest.raises(ConfigError, match="block by block"):
            other.evidence(plan)


def test_a_new_sweep_forgets_the_plan_of_the_old_one(quantizer: FairQuantizer) -> None:
    other = quantizer.protecting("auto")
    other.config = replace(other.config, top=2)
    other.sweep()
    layers = other.recommend()
    assert len(layers.protected_layers) == 2
    assert other.recommend() is layers
    other.sweep(granularity="unit")
    units = other.recommend()
    assert units.protected_layers == ()
    assert len(units.overrides) == 2
    other.sweep(granularity="unit")
    assert other.recommend() is units


def test_a_new_plan_forgets_the_quantized_model_and_the_same_plan_does_not(quantizer: FairQuantizer) -> None:
    other = quantizer.protecting([0])
    other.config = replace(other.config, method="rtn")
    first = other.quantize()
    assert other.quantize(other.recommend()) is first
    assert other.following(other.recommend()).quantize() is first
    plan = quantizer.protecting([1, 3]).recommend()
    second = other.quantize(plan)
    assert (first.plan.protected_layers, second.plan.protected_layers) == ((0,), (1, 3))
    assert other.recommend() is plan
    assert other.quantize() is second


def test_a_plan_of_another_model_is_not_quantized(quantizer: FairQuantizer) -> None:
    plan = quantizer.protecting([0]).recommend()
    plan = replace(plan, units=plan.units | {f"layers.{LAYERS}": "int4"})
    with pytest.raises(ConfigError, match=f"the plan is for {LAYERS + 1} layers"):
        quantizer.quantize(plan)
    with pytest.raises(ConfigError, match=f"the plan is for {LAYERS + 1} layers"):
        quantizer.following(plan)


def test_a_plan_is_recommended_from_a_report_that_is_given(quantizer: FairQuantizer) -> None:
    report = quantizer.protecting("auto").sweep(granularity="unit")
    other = FairQuantizer(quantizer.loaded, quantizer.texts, replace(quantizer.config, top=1))
    layers = other.recommend()
    units = other.recommend(report)
    assert len(layers.protected_layers) == 1
    assert (units.protected_layers, len(units.overrides)) == ((), 1)
    assert other.recommend() is units
    with pytest.raises(ConfigError, match=r'protect_layers \(0,\) leaves .* "auto"'):
        quantizer.protecting([0]).recommend(report)
    with pytest.raises(ConfigError, match=f"the sweep is of {LAYERS + 1} layers"):
        other.recommend(replace(report, layers=LAYERS + 1))


def test_a_quantized_model_that_is_given_is_exported(quantizer: FairQuantizer, tmp_path: Path) -> None:
    config = replace(quantizer.config, method="rtn", protect_layers="none")
    other = FairQuantizer(quantizer.loaded, quantizer.texts, config)
    quantized = other.protecting([0, 2]).quantize()
    record = other.save_pretrained(tmp_path / "given", quantized, measure=None)
    assert record.plan.protected_layers == (0, 2)
    assert other.quantize() is quantized
    foreign = FairQuantizer(replace(quantizer.loaded), quantizer.texts, config).quantize()
    with pytest.raises(ConfigError, match="another instance"):
        other.save_pretrained(tmp_path / "foreign", foreign, measure=None)


def test_a_folder_is_measured_after_an_export_and_not_before(quantizer: FairQuantizer, tmp_path: Path) -> None:
    other = quantizer.protecting([PLANTED_LAYER])
    other.config = replace(other.config, method="rtn")
    with pytest.raises(ConfigError, match="save_pretrained"):
        other.measure_folder()
    record = other.save_pretrained(tmp_path / "checkpoint")
    assert other.measure_folder() == record.measurement
    with pytest.raises(ConfigError, match="save_pretrained"):
        other.protecting("none").measure_folder()


@pytest.mark.parametrize(("protect_layers", "checks"), [("auto", 3), ((PLANTED_LAYER,), 2)])
def test_a_run_resolves_the_model_once_and_checks_what_is_known_of_its_plan(
    planted_model: Path,
    planted_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protect_layers: Any,
    checks: int,
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module in (fair_quantizer, plans, writer, preflight, resolve, load_module, streamed_module):
        for name in ("check_exportable", "resolve_model"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    given: dict[str, Any] = {"group_size": 32, "texts": planted_file, "draws": 200, "max_overhead": 0.4}
    quantizer = FairQuantizer.from_pretrained(str(planted_model), method="rtn", protect_layers=protect_layers, **given)
    quantizer.run(tmp_path / "out")
    assert calls == {"resolve_model": 1, "check_exportable": checks}


def test_what_preflight_resolved_is_not_resolved_again(
    planted_model: Path, planted_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = ModelSource(str(planted_model)), make_config(group_size=32, texts=planted_file)
    checked = preflight.preflight(source, config)
    monkeypatch.setattr(preflight, "resolve_model", lambda *_, **__: pytest.fail("resolved again"))
    monkeypatch.setattr(resolve, "resolve_model", lambda *_, **__: pytest.fail("resolved again"))
    quantizer = FairQuantizer.from_source(source, config, checked=checked)
    assert quantizer.loaded.files is checked.files
    assert quantizer.texts is checked.texts


def test_a_text_set_is_taken_as_it_is_or_in_some_languages(planted_model: Path, planted_file: str) -> None:
    texts = load_texts(planted_file)
    whole = FairQuantizer.from_pretrained(planted_model, texts=texts, group_size=32)
    assert whole.texts is texts
    assert whole.config.texts == texts.name
    named = FairQuantizer.from_pretrained(planted_model, texts=planted_file, languages=["he", "en"], group_size=32)
    taken = FairQuantizer.from_pretrained(planted_model, texts=texts, languages=["he", "en"], group_size=32)
    assert taken.texts == named.texts
    with pytest.raises(ConfigError, match="no sentences in fr"):
        FairQuantizer.from_pretrained(planted_model, texts=texts, languages=["en", "fr"])


def test_a_configuration_and_single_options_are_not_mixed(planted_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"bits together with config.*dataclasses\.replace"):
        FairQuantizer.from_pretrained(planted_model, config=make_config(), bits=3)


def in_memory(folder: Path, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_in_memory_ends_in_the_checkpoint_of_its_files(
    planted_model: Path, planted_file: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    given: dict[str, Any] = {"group_size": 32, "texts": planted_file, "draws": 200, "protect_layers": [PLANTED_LAYER]}
    pair = in_memory(planted_model, dtype)
    pair["model"].generation_config.temperature = 0.5  # without do_sample, which a strict check refuses
    before = {name: value.clone() for name, value in pair["model"].state_dict().items()}
    ours = FairQuantizer.from_pretrained(**pair, **given).run(tmp_path / "memory")
    theirs = FairQuantizer.from_pretrained(planted_model, **given).run(tmp_path / "files")
    assert all(torch.equal(value, before[name]) for name, value in pair["model"].state_dict().items())
    assert (ours.protected.languages, ours.gain) == (theirs.protected.languages, theirs.gain)
    weights = "model.safetensors"
    assert ours.record.files[weights] == theirs.record.files[weights]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(ours.record.files)
    text = "cedar ארז"
    assert AutoTokenizer.from_pretrained(tmp_path / "memory")(text) == pair["tokenizer"](text)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "files")]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert str(planted_model) not in (tmp_path / "memory" / "config.json").read_text()


def test_what_belongs_to_a_name_is_refused_for_a_model_in_memory_and_the_other_way_round(planted_model: Path) -> None:
    pair = in_memory(planted_model)
    with pytest.raises(ConfigError, match="revision, allow_pickle: accepted together with a model's name"):
        FairQuantizer.from_pretrained(**pair, revision="main", allow_pickle=True)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        FairQuantizer.from_pretrained(pair["model"])
    with pytest.raises(ConfigError, match="tokenizer is accepted together with a model in memory"):
        FairQuantizer.from_pretrained(planted_model, tokenizer=pair["tokenizer"])
    with pytest.raises(InvalidLayerError, match=f"layer {LAYERS} does not exist"):
        FairQuantizer.from_pretrained(**pair, protect_layers=[LAYERS])
    with pytest.raises(InvalidLayerError, match="0.fc_in is not a unit of the model"):
        FairQuantizer.from_pretrained(**pair, protect_units=["0.fc_in"])
    with pytest.raises(UnsupportedModelError, match="Linear is not a Transformers model"):
        FairQuantizer.from_pretrained(torch.nn.Linear(2, 2), tokenizer=pair["tokenizer"])  # type: ignore[arg-type]


def test_a_push_is_of_the_last_export_or_of_a_folder(
    quantizer: FairQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[Any, ...]] = []

    def push(folder: Path, repo_id: str, **options: Any) -> str:
        pushed.append((folder, repo_id, options))
        return "url"

    monkeypatch.setattr("quant_fairness_plugin.fair_quantizer.push_folder", push)
    other = FairQuantizer(quantizer.loaded, quantizer.texts, replace(quantizer.config, method="rtn")).protecting([0])
    with pytest.raises(ConfigError, match=r"save_pretrained\(out\)"):
        other.push_to_hub("tester/tiny")
    other.save_pretrained(tmp_path / "checkpoint", measure=None)
    assert other.push_to_hub("tester/tiny", private=False, revision="int4") == "url"
    assert other.push_to_hub("tester/tiny", tmp_path / "earlier") == "url"
    assert pushed == [
        (tmp_path / "checkpoint", "tester/tiny", {"private": False, "revision": "int4"}),
        (tmp_path / "earlier", "tester/tiny", {}),
    ]


def test_with_too_few_sentences_every_claim_says_that_nothing_is_held_out(
    planted_model: Path, planted_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "few.json"
    whole = load_texts(planted_file)
    path.write_text(json.dumps({name: rows[:19] for name, rows in whole.sentences.items()}), encoding="utf-8")
    quantizer = FairQuantizer.from_pretrained(
        str(planted_model), protect_layers=(0,), group_size=32, texts=str(path), draws=100
    )
    said = "the parts of few.json are not disjoint: calibration, search and confirmation share the same sentences"
    assert caplog.text.count(said) == 1
    done = quantizer.run(tmp_path / "out")
    for measurement in (done.protected, done.unprotected, quantizer.measure_folder()):
        assert (measurement.part, measurement.held_out) == ("all", False)
        assert measurement.condition.startswith(said)
    assert said in done.verdict
    assert said.replace("_", "") in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("\\", "")
    found = quantizer.evidence()
    assert found.condition.startswith(said)
    assert said in found.verdict
    assert quantizer.sweep(top=1).condition.startswith(said)
    alone = quantizer.measure().measurements["16 bit"]
    assert (alone.part, alone.held_out, alone.condition) == ("all", True, "")


def test_what_no_sentence_was_used_for_is_held_out_on_all_of_them(planted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"en": ["one two", "three four"]}), encoding="utf-8")
    quantizer = FairQuantizer.from_pretrained(
        str(planted_model), method="rtn", protect_layers="none", group_size=32, texts=str(path), draws=100
    )
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.measurement is not None
    assert (record.measurement.part, record.measurement.held_out) == ("all", True)


def test_a_folder_says_that_it_was_calibrated_on_what_it_is_measured_on(
    quantizer: FairQuantizer, planted_model: Path, planted_file: str, tmp_path: Path
) -> None:
    plain = quantizer.protecting("none")
    plain.save_pretrained(tmp_path / "out", measure=None)
    assert plain.measure_folder(part="confirm").held_out is True
    assert plain.measure_folder(part="calibrate").condition.startswith("calibration uses these sentences")
    other = FairQuantizer.from_pretrained(str(planted_model), texts="bundled", languages=("en", "he"), draws=100)
    measured = other.measure_folder(tmp_path / "out")
    assert (measured.held_out, measured.original_compared) == (True, True)  # no sentence of the one is in the other


def test_a_gguf_file_of_five_bits_comes_from_memory_and_is_refused_before_the_work(
    planted_model: Path, planted_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.export.gguf_files import write_gguf_of

    like = write_gguf_of(planted_model, tmp_path / "like.gguf")

    def opened(**options: Any) -> FairQuantizer:
        options = {"format": "gguf", "like": str(like), "protect_layers": "none"} | options
        return FairQuantizer.from_pretrained(str(planted_model), texts=planted_file, **options)

    quantizer = opened(bits=5)
    report = quantizer.save_gguf(tmp_path / "out.gguf")
    assert report.exact
    assert report.types["Q5_0"] == report.packed > 0
    monkeypatch.setattr(FairQuantizer, "quantize", lambda *_: pytest.fail("quantized before the refusal"))
    refused: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"bits": 3}, UnsupportedModelError, "not written with 3 bits; allowed are 4, 5 and 8"),
        ({"symmetric": False}, UnsupportedModelError, "no zero points; allowed is a symmetric grid. Use --sym"),
        ({"group_size": 64}, UnsupportedModelError, "group size 64 saves nothing in a GGUF file"),
        ({"like": None}, ConfigError, "GGUF file of the 16-bit model, and none is given"),
        ({"format": "gptq", "like": None}, ConfigError, "format 'gptq' is no GGUF file"),
    )
    for options, kind, message in refused:
        with pytest.raises(kind, match=message):
            opened(**options).save_gguf(tmp_path / "other.gguf")
    with pytest.raises(ConfigError, match="exists already"):
        opened().save_gguf(tmp_path / "out.gguf")
    with pytest.raises(ConfigError, match=r"format 'gguf' is one file, and a folder is to be written.*save_gguf"):
        opened().save_pretrained(tmp_path / "folder")


def test_a_plan_for_a_gguf_file_counts_the_embedding_in_eight_bits(
    planted_model: Path, planted_file: str, tmp_path: Path
) -> None:
    from tests.export.gguf_files import write_gguf_of

    like = write_gguf_of(planted_model, tmp_path / "like.gguf")
    options: Any = {"texts": planted_file, "format": "gguf", "like": str(like)}
    plain = FairQuantizer.from_pretrained(str(planted_model), protect_layers="none", **options)
    plain.save_gguf(tmp_path / "plain.gguf")
    sizes = counted_bytes(tmp_path / "plain.gguf")
    budget = int(sizes * 1.1)
    planned = FairQuantizer.from_pretrained(str(planted_model), max_size=budget, sentences=4, **options)
    plan = planned.recommend()
    planned.save_gguf(tmp_path / "planned.gguf")
    assert plan.overrides
    written = counted_bytes(tmp_path / "planned.gguf")
    assert sizes < written <= budget
    assert written - sizes == plan.extra_bytes
    assert plan.overhead == round(plan.extra_bytes / sizes, 6)


def counted_bytes(path: Path) -> int:
    """Of all tensors of a GGUF file, with vectors, which are in 32 bit there, in 16 as plans count them."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return sum(int(tensor.n_bytes) // (2 if len(tensor.shape) == 1 else 1) for tensor in tensors)


def test_a_plan_of_another_model_of_as_many_layers_is_priced_here(
    quantizer: FairQuantizer, caplog: pytest.LogCaptureFixture
) -> None:
    plan = quantizer.protecting([0]).recommend()
    foreign = replace(plan, model="other", extra_bytes=7, overhead=0.9, reasons=("measured worst 0.1",))
    followed = quantizer.following(foreign).recommend()
    assert (followed.extra_bytes, followed.overhead, followed.model) == (plan.extra_bytes, plan.overhead, plan.model)
    assert followed.reasons == ("of other: measured worst 0.1",)
    assert "the plan was made for other, and is followed for" in caplog.text
    assert quantizer.following(plan).recommend() is plan


def test_a_gguf_file_of_another_model_is_found_before_anything_is_quantized(
    planted_model: Path, planted_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.export.gguf_files import write_gguf_of

    like = write_gguf_of(Path(resolve.bundled_folder("demo")), tmp_path / "demo.gguf")
    monkeypatch.setattr(FairQuantizer, "quantize", lambda *_: pytest.fail("quantized before the refusal"))
    quantizer = FairQuantizer.from_pretrained(
        str(planted_model), texts=planted_file, format="gguf", like=str(like), protect_layers="none"
    )
    with pytest.raises(ArtifactError, match="file of another model|no counterpart"):
        quantizer.save_gguf(tmp_path / "out.gguf")
