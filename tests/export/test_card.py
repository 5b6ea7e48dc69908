"""The model card says what the record says, and nothing from outside can break out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from huggingface_hub import ModelCard

from quant_fairness_plugin.artifacts import (
    Answer,
    Answers,
    ExportRecord,
    Interval,
    LanguageAnswers,
    Precision,
    ReaderRun,
    Undefined,
    load,
)
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.export.card import render_card
from quant_fairness_plugin.export.source_card import SourceCard
from tests.export.build import measurement
from tests.export.conftest import Exported
from tests.hub_http import HTTP

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
    found = front_matter(card)
    assert found.pop("model-index")[0]["name"] == "org/Model-1.5B"
    assert found == {
        "base_model": "org/Model-1.5B",
        "base_model_relation": "quantized",
        "language": ["en", "he"],
        "library_name": "transformers",
        "quantized_by": "quant-fairness",
        "tags": ["quant-fairness", "compressed-tensors", "rtn", "int4"],
    }


def test_the_hub_s_own_reader_takes_the_card_and_finds_the_damage_of_each_known_language(
    record: ExportRecord, tmp_path: Path
) -> None:
    """The part of `ModelCard.validate` that needs no network: the metadata is parsed with its results."""
    path = tmp_path / "README.md"
    path.write_text(render_card(replace(named(record, "org/Model-1.5B"), measurement=measurement())), encoding="utf-8")
    card = ModelCard.load(path)
    assert card.data.base_model == "org/Model-1.5B"
    assert card.data.model_name == "org/Model-1.5B"
    assert [(r.dataset_config, r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("en", "confirm", "kl-bits-per-byte", 0.125),
        ("en", "confirm", "delta-bits-per-byte", 0.125),
    ]
    sent: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:  # what the Hub would be asked: the same text
        patch.setattr("huggingface_hub.repocard.get_session", lambda: _Hub(sent))
        card.validate()
    assert (
        yaml.safe_load(sent[0]["content"].split("\n---\n")[0])["model-index"] == front_matter(str(card))["model-index"]
    )


class _Hub:
    """Takes a card and finds nothing wrong."""

    def __init__(self, sent: list[dict[str, Any]]) -> None:
        self._sent = sent

    def post(self, url: str, json: dict[str, Any], headers: object) -> Any:
        self._sent.append(json)
        return HTTP.Response(200, json={"errors": [], "warnings": []}, request=HTTP.Request("POST", url))


def test_the_card_names_the_reader_that_ran_or_says_that_none_did(record: ExportRecord) -> None:
    assert isinstance(record.reader_run, ReaderRun)
    version = re.escape(record.reader_run.version)
    assert re.search(rf"and by transformers {version} in float32: logits within ", render_card(record))
    none = replace(record, reader_run=Undefined("Transformers needs gptqmodel"))
    assert "**no reader was run**: Transformers needs gptqmodel" in render_card(none)


def test_answers_are_counted_beside_the_16_bit_models_with_an_example(record: ExportRecord) -> None:
    loops = Answer(
        prompt="What *is* it?", sixteen_bit="A fish.", checkpoint="fish | fish | fish",
        sixteen_bit_faults=(), checkpoint_faults=("repeats itself",),
    )  # fmt: skip
    fine = replace(loops, checkpoint="A crab.", checkpoint_faults=())
    answers = Answers(
        source="bundled", chat_template=True, new_tokens=32, dtype="float32",
        languages=(LanguageAnswers(language="en", answers=(fine, loops)),), not_asked={"he": "unknown"},
    )  # fmt: skip
    card = render_card(replace(record, measurement=replace(measurement(), answers=answers)))
    assert "| en | 0 → 0 of 2 | 0 → 1 of 2 | 0 → 0 of 2 |" in card
    assert r"- this checkpoint: fish \| fish \| fish" in card
    assert r'to "What \*is\* it?"' in card
    skipped = replace(measurement(), answers=Undefined("--prompts none"))
    assert "No prompts were asked: --prompts none." in render_card(replace(record, measurement=skipped))


def test_layers_with_the_same_bits_share_a_row_of_the_map(record: ExportRecord) -> None:
    rows = render_card(record).split("Bits of the weights, by layer and module:\n")[1].strip().splitlines()
    assert rows[0].startswith("| layers | q\\_proj |")
    assert [row.split(" | ")[:2] for row in rows[2:4]] == [["| 0, 2-11", "4"], ["| 1", "16"]]


def test_the_card_s_command_makes_the_same_weights_again(
    planted_model: Path, planted_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, again = tmp_path / "made", tmp_path / "again"
    command = ["quantize", str(planted_model), "--texts", planted_file, "--group-size", "32", "--prompts", "none"]
    command += ["--protect-layers", "2", "--tokens-per-language", "100", "-o", str(made)]
    assert run_guarded(typer.main.get_command(app), command, "quant-fairness") == 0
    said = (made / "README.md").read_text(encoding="utf-8").split("```bash\n")[1].split("\n```")[0]
    assert said.startswith("quant-fairness quantize MODEL --plan quant_fairness.json --method gptq ")
    given = said.replace(" MODEL ", f" {planted_model} ").replace(" TEXTS ", f" {planted_file} ")
    monkeypatch.chdir(made)
    words = [*given.split()[1:], "--prompts", "none", "-o", str(again)]
    assert run_guarded(typer.main.get_command(app), words, "quant-fairness") == 0
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


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
    found = front_matter(card)
    assert found.pop("model-index")
    assert found == kept | {
        "base_model": "google/gemma-2b",
        "base_model_relation": "finetune",
        "language": ["he"],
        "library_name": "transformers",
        "quantized_by": "quant-fairness",
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


def test_the_checkpoint_stands_beside_the_16_bit_model_and_itself_without_protection(record: ExportRecord) -> None:
    ratio = Interval(1.5, 1.25, 1.75)
    found = replace(measurement(), disparity=ratio)
    plan = replace(record.plan, extra_bytes=1000)
    card = render_card(replace(record, plan=plan, measurement=found, unprotected=found))
    rows = [line.split(" | ") for line in card.split("| configuration |")[1].splitlines()[2:5]]
    whole, bare, this = record.sixteen_bit_bytes, record.weight_bytes - 1000, record.weight_bytes
    assert [row[0] for row in rows] == ["| 16-bit model", "| INT4 without protection", "| this checkpoint"]
    assert [int(row[1]) for row in rows] == [whole, bare, this]
    assert [row[2] for row in rows] == ["100%", f"{bare / whole:.0%}", f"{this / whole:.0%}"]
    assert [row[4:6] for row in rows[1:]] == [["1.5000 [1.2500, 1.7500]", "others lose more"]] * 2


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
