"""Each part of the page shows the figures of its artifacts."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from quant_fairness_plugin.analysis.kinds import ANALYSES
from quant_fairness_plugin.artifacts import ExpertCoverage, Measurement, ProtectionPlan, Undefined
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.report.compared import compare, evaluated_row
from quant_fairness_plugin.report.section import Section, shade
from quant_fairness_plugin.report.sections import analyses as analyses_module
from quant_fairness_plugin.report.sections.analyses import analysis_section
from quant_fairness_plugin.report.sections.answers import answers_section
from quant_fairness_plugin.report.sections.configurations import configurations_section
from quant_fairness_plugin.report.sections.controls import controls_section
from quant_fairness_plugin.report.sections.coverage import coverage_section
from quant_fairness_plugin.report.sections.damage import damage_section
from quant_fairness_plugin.report.sections.experts import experts_section
from quant_fairness_plugin.report.sections.layers import layers_section
from quant_fairness_plugin.report.sections.precision import precision_section
from quant_fairness_plugin.report.sections.tradeoff import evidence_tradeoff, sweep_tradeoff
from quant_fairness_plugin.report.sources import Sources
from quant_fairness_plugin.report.words import Figure, Language, Written
from tests.planted import LANGUAGES, planted_report
from tests.report.samples import PLAN, analyses, answers, evidence, measured, record


def plan_with(*layers: int, of: int = 3) -> ProtectionPlan:
    units = {f"layers.{i}": "fp16" if i in layers else "int4" for i in range(of)}
    return replace(PLAN, units=units)  # type: ignore[arg-type] # both are precisions


def test_layers_show_what_protection_saves_in_each_language() -> None:
    swept = planted_report([0.5, 3.0, 0.25])
    section = layers_section(swept)
    assert section is not None
    rows = {row.plan: {d.language: d.kl_bits_per_byte.estimate for d in row.damage} for row in swept.rows}
    for layer, shown in enumerate(section.table.rows):
        saved = [1000 * (rows["none"][name] - rows[f"protect {layer}"][name]) for name in LANGUAGES]
        assert shown[0] == str(layer)
        found = [float(cell.text) for cell in shown[1:] if isinstance(cell, Figure)]
        assert found == pytest.approx(saved, abs=0.05)  # shown with one decimal
    assert "largest at 1." in section.lead


def test_units_are_named_as_people_write_them() -> None:
    section = layers_section(planted_report([0.5, 3.0, 0.25, 0.125], groups=("qkv", "down")))
    assert section is not None
    assert [row[0] for row in section.table.rows] == ["0.qkv", "0.down", "1.qkv", "1.down"]


def test_bits_are_those_of_the_record_and_16_where_the_plan_keeps_them() -> None:
    section = precision_section(PLAN, record())
    assert section.table.columns == ("layer", "q_proj", "up_proj", "down_proj", "odd")
    assert section.table.rows == (
        ("0", "16", "16", "16", "16"),  # a protected layer, whose modules the record does not list
        ("1", "4", "4", "16", "16"),
        ("2", "8", "8", "8", "16"),
    )
    assert "each group of 64 weights shares a scale" in section.lead


def test_several_group_sizes_are_said() -> None:
    made = replace(record(), group_sizes={"model.layers.2.mlp.down_proj": 32})
    assert "int4 g64 sym absmax · 1 of 5 modules g32" in precision_section(PLAN, made).lead


def test_experts_of_a_layer_share_a_cell() -> None:
    modules = {f"model.layers.0.mlp.experts.{e}.down_proj": 8 if e else 4 for e in range(3)}
    made = replace(record(), quantized_modules=modules, kept_modules={}, plan=plan_with(of=1))
    assert precision_section(made.plan, made).table.rows == (("0", "4/8"),)


def test_modules_that_end_alike_keep_their_whole_names() -> None:
    modules = {f"transformer.h.0.{name}": 4 for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")}
    made = replace(record(), quantized_modules=modules, kept_modules={}, plan=plan_with(of=1))
    section = precision_section(made.plan, made)
    assert section.table.columns == ("layer", "c_attn", "attn.c_proj", "mlp.c_proj")
    assert section.picture is not None
    assert not section.picture.scrolls


def test_a_map_of_many_languages_scrolls_rather_than_lose_its_figures() -> None:
    modules = {f"model.layers.0.m{i}": 4 for i in range(13)}
    made = replace(record(), quantized_modules=modules, kept_modules={}, plan=plan_with(of=1))
    picture = precision_section(made.plan, made).picture
    assert picture is not None
    assert picture.scrolls


def test_a_module_that_a_layer_does_not_have_is_not_said_to_be_in_16_bit() -> None:
    modules = {"model.layers.0.a": 4, "model.layers.0.b": 4, "model.layers.1.a": 4}
    made = replace(record(), quantized_modules=modules, kept_modules={}, plan=plan_with(of=2))
    assert precision_section(made.plan, made).table.rows == (("0", "4", "4"), ("1", "4", "none"))


def test_a_plan_alone_shows_its_layers_and_what_it_names_apart() -> None:
    rows = precision_section(PLAN, None).table.rows
    assert rows == (("0", "16", "none"), ("1", "4", "16"), ("2", "8", "none"))


def test_calibration_by_language_and_nothing_where_there_was_none() -> None:
    section = coverage_section(record())
    assert section is not None
    assert section.lead.startswith("1,311 tokens, 2 languages")
    assert section.table.rows[1] == (Language.of("he"), Figure("77"), Figure("1"), Figure("0.250"))
    assert coverage_section(replace(record(), calibration={})) is None


def test_experts_of_each_layer_and_language() -> None:
    """By hand: of two experts calibration reached the second with 10 tokens in all, which are Hebrew."""
    counts = {"layers.1": {"en": (100, 0), "he": (70, 10)}}
    coverage = ExpertCoverage(
        experts=2,
        calibrated=counts,
        reached={"layers.1": {"en": (5, 0), "he": (3, 9)}},
        gates={"layers.1": {"en": (1.0, 0.0), "he": (0.25, 0.75)}},
        part="confirm",
    )
    section = experts_section(coverage)
    assert section.lead.startswith("Most exposed is Hebrew in layer 1: 75 % of its gate weights")
    assert section.table.rows[1] == ("1", Language.of("he"), *map(Figure, ("2 of 2", "1 of 2", "1 of 2", "75.0%")))
    assert section.table.rows[0][-1] == Figure("0.0%")


def test_every_plan_of_a_sweep_is_in_the_table_and_the_recommended_one_is_marked() -> None:
    swept = planted_report([0.5, 3.0, 0.25])
    section = sweep_tradeoff(swept, plan_with(1))
    assert section is not None
    assert sorted(str(row[0]) for row in section.table.rows) == [
        "none", "protect 0", "protect 1 (recommended)", "protect 2",
    ]  # fmt: skip
    assert "takes 2.02 kB" in section.lead  # 500 around, 1000 in 16 bit, 2 × 260


def test_a_recommended_plan_that_was_not_evaluated_is_not_given_a_harm() -> None:
    swept = planted_report([0.5, 3.0, 0.25])
    section = sweep_tradeoff(swept, plan_with(0, 1))
    assert section is not None
    assert not [row for row in section.table.rows if "recommended" in str(row[0])]
    assert "takes 2.76 kB; it is a sum of evaluated ones" in section.lead
    assert [key.symbol for key in section.keys][-1] == "dashed-chosen"


def test_only_a_row_with_the_same_units_and_precisions_is_the_plan() -> None:
    swept = planted_report([0.5, 3.0, 0.25])
    row = evaluated_row(swept, plan_with(2))
    assert row is not None
    assert row.plan == "protect 2"
    assert evaluated_row(swept, PLAN) is None


def test_random_plans_are_many_and_ours_is_first() -> None:
    section = controls_section(evidence())
    assert section is not None
    assert [str(row[0]) for row in section.table.rows][:2] == ["the plan", "random 0"]
    assert "The plan is better than 88 % of 8 random plans (95 % interval 47 to 100 %, p = 0.222)" in section.lead
    without = replace(evidence(), standing=Undefined("no random plan fits"))
    assert "undefined: no random plan fits" in (controls_section(without) or section).lead


def test_evidence_has_its_own_tradeoff() -> None:
    section = evidence_tradeoff(evidence())
    assert section is not None
    assert section.lead.startswith("2 of 11 evaluated plans are worth their bytes.")
    assert "nothing was selected on" in section.lead


@pytest.mark.parametrize(
    ("held_out", "said"), [(True, "neither calibration"), (False, "Not held out"), (None, "Not h")]
)
def test_it_is_said_whether_the_sentences_were_new(held_out: bool | None, said: str) -> None:
    compared = compare(Sources.of([measured(held_out=held_out, en=0.1)]), None)
    assert compared is not None
    assert said in compared.condition


def test_the_order_is_by_loss_and_what_does_not_count_comes_last() -> None:
    section = damage_of(measured(en=0.1, hi=9.0, zh=0.3, ar=0.2))
    names = [row[0].tag for row in section.table.rows if isinstance(row[0], Language)]
    assert names == ["zh", "ar", "en", "hi"]


def test_a_bound_that_is_far_away_is_said_and_not_drawn() -> None:
    near, far = (damage_of(measured(en=value)) for value in (0.1, 0.001))
    assert [key.text for key in near.keys][-1] == "what the verdict accepts: 0.05 bits per byte"
    assert [key.text for key in far.keys][-1].endswith("far to the right of this picture")
    assert near.picture is not None
    assert far.picture is not None
    assert "bound 0.05" in near.picture.wide
    assert "bound 0.05" not in far.picture.wide


def damage_of(measurement: Measurement) -> Section:
    compared = compare(Sources.of([measurement]), None)
    assert compared is not None
    return damage_section(compared, Gate())


@pytest.mark.parametrize(("value", "wanted"), [(-1.0, 0), (0.0, 0), (1e-9, 1), (0.5, 4), (0.99, 6), (1.0, 6)])
def test_shades(value: float, wanted: int) -> None:
    assert shade(value, 1.0, 7) == wanted


def test_answers_show_both_models_and_the_language_with_new_faults_first() -> None:
    section = answers_section(answers())
    assert section is not None
    assert [row[0] for row in section.table.rows] == [Language.of("he")] * 3 + [Language.of("en")] * 3
    assert section.table.rows[0][3:] == (Written("האור האור האור האור", "he"), "repeats itself")
    assert "2 of 6 answers of this checkpoint have a fault, 0 of the 16-bit model's" in section.lead
    assert "in Hebrew it shows one that the 16-bit model does not" in section.lead
    assert section.picture is not None
    assert "0 → 2 of 3" in section.picture.wide
    assert section.notes[-1][1] == "Hindi hi: the 16-bit model does not know it."


@pytest.mark.parametrize(
    ("name", "chart", "lead"),
    [
        ("weights", "layer 2", "Largest at layer 2: 3 (excess kurtosis"),
        ("tokens", "Hebrew he", "Largest at English en: 0.25 (tokens of a sentence)."),
        ("representations", "21", "Largest at layer 2 English en: 21 (error of a layer's output"),
        ("interventions", "bits 3 bits", "Largest at bits 3 bits: 0.25 (loss of the worst"),
        ("choices", "Hebrew he verbs", "Largest at Hebrew he verbs: 0.25 (share"),
        ("hypotheses", "tokens", "Largest at tokens: 0.25 (rank correlation"),
        ("depth", "m n protect-one", "Largest at m n protect-one: 0.25 (Kendall's τ"),
        ("clipping", "250", "Largest at layer 2 English en: 250 (error of one threshold"),
    ],
)
def test_every_analysis_is_drawn_and_listed(name: str, chart: str, lead: str) -> None:
    answer = next(answer for answer in analyses() if answer.analysis == name)
    section = analysis_section(answer)
    assert section is not None
    assert section.title == f"What of {name}?"
    assert section.lead.startswith(lead)
    assert section.picture is not None
    assert f">{chart}<" in section.picture.wide
    assert len(section.table.rows) == len(next(value for value in answer.result.values() if isinstance(value, list)))


def test_charts_name_fields_that_the_analyses_have() -> None:
    """Each answer is a dataclass; a field that was renamed there would leave the page without its chart."""
    for name, how in analyses_module._CHARTS.items():
        module = importlib.import_module(f"quant_fairness_plugin.analysis.{name}")
        answer = get_type_hints(get_type_hints(module.analyse)["return"])
        row = get_args(answer[how.rows])[0]
        assert {*how.label, how.value, *filter(None, [how.minus])} <= set(get_type_hints(row))
    assert set(analyses_module._CHARTS) == set(ANALYSES)


def test_an_analysis_without_a_chart_and_undefined_figures_are_in_the_table() -> None:
    found = {answer.analysis: analysis_section(answer) for answer in analyses()}
    new, changes = found["new"], found["interventions"]
    assert new is not None
    assert changes is not None
    assert (new.picture, new.table_open, new.table.rows) == (None, True, (("a thing", Figure("7")),))
    assert changes.table.rows[1][2] == "undefined: no language"
    assert analysis_section(replace(analyses()[0], result={"layers": []})) is None


def test_a_configuration_that_a_smaller_one_beats_is_of_no_use() -> None:
    made = replace(record(measured(en=0.2, he=0.4)), unprotected=measured("none", en=0.1, he=0.3))
    section = configurations_section(made, None)
    assert section is not None
    assert (
        section.lead == "40 kB for the 16-bit model, 7.5 kB for INT4 without protection and 10 kB for this checkpoint."
    )
    assert section.table.rows[0][3:6] == (Figure("0"), "", "")
    assert [row[-1] for row in section.table.rows] == [
        "where its bytes do not matter",
        "worth its bytes",
        "none: INT4 without protection takes no more and loses less",
    ]
    better = replace(made, unprotected=None)
    assert configurations_section(better, measured("none", en=0.9)) is not None
    rows = configurations_section(better, None)
    assert rows is not None
    assert [row[0] for row in rows.table.rows] == ["16-bit model", "this checkpoint"]
    assert configurations_section(record(), None) is None


def test_a_collapsed_configuration_is_of_no_use() -> None:
    section = configurations_section(record(measured(en=0.2, xx=9.0)), None)
    assert section is not None
    assert section.table.rows[1][3:] == (Figure("undefined: collapsed in xx"),) * 2 + ("undefined", "none")
