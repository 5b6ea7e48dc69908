"""The model card says what the record says, and nothing from outside can break out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from quant_fairness_plugin.artifacts import ExportRecord, Precision, Undefined, load
from quant_fairness_plugin.export.card import render_card
from quant_fairness_plugin.export.source_card import SourceCard
from tests.export.build import measurement
from tests.export.conftest import Exported

HOSTILE = '<script>alert(1)</script>|x`y`\n---\n[a](javascript:b) "q"'


@pytest.fixture
def record(exported: Exported) -> ExportRecord:
    return load(ExportRecord, exported() / "quant_fairness.json")


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card.split("\n---\n")[0])
    return found


def named(record: ExportRecord, model: str) -> ExportRecord:
    return replace(record, provenance=replace(record.provenance, model=model))


def test_the_front_matter_is_yaml_that_the_hub_reads(record: ExportRecord) -> None:
    card = render_card(replace(named(record, "org/Model-1.5B"), measurement=measurement()))
    assert front_matter(card) == {
        "base_model": "org/Model-1.5B",
        "base_model_relation": "quantized",
        "language": ["en", "he"],
        "library_name": "transformers",
        "tags": ["quant-fairness", "compressed-tensors", "rtn", "int4"],
    }


def test_without_a_measurement_no_language_is_claimed(record: ExportRecord) -> None:
    card = render_card(record)
    assert "language" not in front_matter(card)
    assert "Not measured." in card


def test_a_local_path_is_not_given_away(record: ExportRecord) -> None:
    """Nor passed off as the id of a model on the Hub."""
    card = render_card(named(record, "/home/me/secret/model"))
    assert not {"base_model", "base_model_relation"} & front_matter(card).keys()
    assert "secret" not in card


def test_the_sources_front_matter_is_kept_where_it_still_holds(record: ExportRecord) -> None:
    kept = {"license": "other", "license_name": "gemma", "license_link": "LICENSE", "datasets": ["a/b"]}
    source = SourceCard("google/gemma-2b", "finetune", ["he"], ["poetry", "int4"], kept, "README.source.md")
    card = render_card(replace(named(record, "mine"), measurement=measurement()), source)
    assert front_matter(card) == kept | {
        "base_model": "google/gemma-2b",
        "base_model_relation": "finetune",
        "language": ["he"],
        "library_name": "transformers",
        "tags": ["quant-fairness", "compressed-tensors", "rtn", "int4", "poetry"],
    }
    assert "[README.source.md](README.source.md)" in card


def test_the_table_has_one_row_for_each_language_with_intervals(record: ExportRecord) -> None:
    card = render_card(replace(record, measurement=measurement()))
    rows = [line for line in card.splitlines() if line.startswith(("| en ", "| he "))]
    cell = "0.1250 [0.0625, 0.2500]"
    assert rows[0] == f"| en | 1.500 | 1.625 | {cell} | {cell} | {cell} | supported |"
    assert rows[1].endswith("| unsupported: no better than a byte unigram model |")
    assert "`confirm`" in card
    assert "**SHIP WITH CARE: 1 of 1 languages lose more than 0.05 bits per byte; most en, 0.125 " in card
    assert "three words" in card


def test_an_undefined_number_is_shown_with_its_reason(record: ExportRecord) -> None:
    card = render_card(replace(record, measurement=replace(measurement(), worst_kl=Undefined("one *word*"))))
    assert r"undefined: one \*word\*" in card


def test_what_is_protected_is_listed_with_reasons(record: ExportRecord) -> None:
    card = render_card(replace(record, kept_modules={"a.b": "odd width"}))
    assert "Layers 1 keep 16 bit" in card
    assert "- chosen by the test" in card
    assert "- a.b: odd width" in card
    assert "12.5 %" in card
    nothing = replace(record.plan, units=dict.fromkeys(record.plan.units, "int4"))
    assert "No layer is kept in 16 bit as a whole" in render_card(replace(record, plan=nothing))


@pytest.mark.parametrize("place", ["model", "reason", "status", "kept"])
def test_hostile_text_stays_text(record: ExportRecord, place: str) -> None:
    changed = {
        "model": named(record, HOSTILE),
        "reason": replace(record, plan=replace(record.plan, reasons=(HOSTILE,), source=HOSTILE)),
        "status": replace(record, measurement=measurement(HOSTILE)),
        "kept": replace(record, kept_modules={HOSTILE: HOSTILE}),
    }[place]
    card = render_card(changed)
    body = card.split("\n---\n", 1)[1]
    assert front_matter(card)["library_name"] == "transformers"
    assert "<" not in body
    assert not re.search(r"(?<!\\)\]\(java", body)
    assert not re.search(r"(?<!\\)`y", body)
    assert "\n---" not in body
    rows = [line for line in body.splitlines() if line.startswith("| he ")]
    assert all(row.replace(r"\|", "").count("|") == 8 for row in rows)
    assert len(rows) == (place == "status")


@pytest.mark.parametrize(
    ("family", "format_name", "expected", "absent"),
    [
        ("llama", "compressed-tensors", "This needs `compressed-tensors`", "Do not load"),
        ("llama", "gptq", "This needs `optimum` and `gptqmodel`", "Do not load"),
        ("gpt2", "gptq", "Do not load this checkpoint with Transformers", "AutoModelForCausalLM"),
        ("llama", "awq", "This needs `gptqmodel`", "Do not load"),
        ("llama", "awq", "GPTQModel.load", "optimum"),
        ("bloom", "compressed-tensors", "Do not load this checkpoint with vLLM", "vllm serve"),
        ("gpt2", "fp16-twin", "AutoModelForCausalLM", "Do not load"),
        ("bloom", "fp16-twin", "vllm serve", "vLLM cannot load"),
    ],
)
def test_it_says_how_to_load_this_format_of_this_family(
    record: ExportRecord, family: str, format_name: Any, expected: str, absent: str
) -> None:
    card = render_card(replace(record, family=family, format=format_name))
    assert expected in card
    assert absent not in card


def test_units_and_8_bit_layers_are_shown(record: ExportRecord) -> None:
    assert "Other precisions" not in render_card(record)
    units: dict[str, Precision] = {"layers.2": "int8", "layers.3.gate_up": "fp16"}
    plan = replace(record.plan, units=record.plan.units | units)
    wide = {name: 8 if ".layers.2." in name else 4 for name in record.quantized_modules}
    card = render_card(replace(record, plan=plan, quantized_modules=wide))
    assert r"| Other precisions | layer 2 in 8 bit; 3.gate\_up in 16 bit |" in card
    assert "| Layers in 16 bit | 1 of 0..11 (explicit) |" in card
    assert "70 linear modules are stored with 4 bits and 7 with 8, in the format" in card
    assert "Precisions of their own: layer 2 in 8 bit" in card


def test_a_gptq_card_with_8_bit_layers_warns_of_transformers(record: ExportRecord) -> None:
    plan = replace(record.plan, units=record.plan.units | {"layers.2": "int8"})
    card = render_card(replace(record, plan=plan, format="gptq"))
    assert "**Do not load this checkpoint with Transformers**: format 'gptq' says by" in card
    assert "vllm serve" in card
