"""The eight steps in one go, on a tiny trained model whose damage is planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import ExportRecord, Interval, Ranking, load
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.serve.load import load_quantized
from tests.planted_model import LAYERS, PLANTED_LAYER, WORDS


@pytest.fixture(scope="module")
def quantizer(planted_model: Path, planted_file: str) -> FairQuantizer:
    return FairQuantizer.from_pretrained(
        str(planted_model), group_size=32, texts=planted_file, max_overhead=0.4, draws=200
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
    assert result.gain.low > 0
    assert result.verdict.startswith("protection lowered the worst language's KL")
    assert [row.language for row in result.protected.languages] == list(WORDS)


def test_the_record_is_what_was_returned(result: RunResult, out: Path) -> None:
    record = load(ExportRecord, out / "quant_fairness.json")
    assert record == result.record
    assert record.measurement == result.protected
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
    plan = quantizer.recommend()
    assert quantizer.sweep().precisions == ("fp16", "int8")
    assert plan.units[f"layers.{PLANTED_LAYER}"] == "int8"


def test_precisions_that_the_reader_cannot_load_are_refused_before_the_sweep(
    planted_model: Path, planted_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "quant_fairness_plugin.steps.sweep_units", lambda *_, **__: pytest.fail("it was swept")
    )
    given: dict[str, Any] = {"texts": planted_file, "group_size": 32, "format": "gptq"}
    quantizer = FairQuantizer.from_pretrained(str(planted_model), precisions=("fp16", "int8"), **given)
    with pytest.raises(UnsupportedModelError, match="8"):
        quantizer.save_pretrained(tmp_path / "out")


def test_a_sweep_in_bfloat16_says_so_and_finds_the_planted_layer(planted_model: Path, planted_file: str) -> None:
    config = make_config(group_size=32, texts=planted_file, draws=200)
    quantizer = FairQuantizer.from_source(ModelSource(str(planted_model)), config, dtype="bfloat16")
    report = quantizer.sweep(top=1)
    assert quantizer.loaded.model.dtype == torch.bfloat16
    assert report.provenance.arguments["dtype"] == "bfloat16"
    ranking = report.rankings["protect-one worst"]
    assert isinstance(ranking, Ranking)
    assert ranking.layers[0] == PLANTED_LAYER


def test_a_model_that_stays_in_its_files_can_only_be_swept(planted_model: Path, planted_file: str) -> None:
    config = make_config(group_size=32, texts=planted_file, draws=200)
    streamed = FairQuantizer.from_source(ModelSource(str(planted_model)), config, memory_budget=10**9)
    assert streamed.sweep(top=1).layers == LAYERS
    plan = streamed.recommend()
    for step in (streamed.measure, lambda: streamed.quantize(plan), lambda: streamed.evidence(plan)):
        with pytest.raises(ConfigError, match="opened with a memory budget.*Open it without one"):
            step()


def test_evidence_is_of_the_confirm_part_and_of_the_plan(quantizer: FairQuantizer, result: RunResult) -> None:
    evidence = quantizer.evidence()
    assert evidence.plan == quantizer.recommend()
    assert set(evidence.languages) == set(WORDS)
    worst = evidence.row("the plan").worst
    assert isinstance(worst, Interval)
    assert evidence.provenance.text_sha256 == result.record.provenance.text_sha256


def test_a_wrong_layer_fails_before_the_weights_are_read(planted_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.load_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InvalidLayerError, match=f"layer {LAYERS} does not exist"):
        FairQuantizer.from_pretrained(str(planted_model), protect_layers=[LAYERS])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"format": "gptq", "symmetric": False}, "symmetric"), ({"bits": 3}, "checkpoints of 3 bits")],
)
def test_what_no_reader_loads_is_refused_before_anything_is_quantized(
    quantizer: FairQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.steps.quantize_model", lambda *a, **k: pytest.fail("quantized"))
    monkeypatch.setattr("quant_fairness_plugin.steps.sweep_units", lambda *a, **k: pytest.fail("swept"))
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
