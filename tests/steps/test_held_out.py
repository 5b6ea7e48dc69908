"""What is held out is known by the sentences themselves, never by the name of a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import (
    ExportRecord,
    TextSet,
    UsedSentences,
    from_json,
    join_digests,
    sentence_digests,
    to_json,
)
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.steps.held_out import held_out_of
from quant_fairness_plugin.texts.load import load_texts
from tests.report import samples


def sentence(number: int, language: str = "en") -> str:
    return f"Sentence number {number} of them, in {language}."


def write(path: Path, numbers: range) -> Path:
    path.write_text(json.dumps({name: [sentence(i, name) for i in numbers] for name in ("en", "he")}), encoding="utf-8")
    return path


def record_on(texts: TextSet, *, old: bool = False, searched: bool = False) -> ExportRecord:
    def digests(part: TextSet) -> str:
        return sentence_digests(text for rows in part.sentences.values() for text in rows)

    used = UsedSentences(
        calibrated=digests(texts.part("calibrate")), searched=digests(texts.part("search")) if searched else ""
    )
    record = samples.record()
    provenance = replace(record.provenance, text_set=texts.name, text_sha256=texts.sha256)
    return replace(record, provenance=provenance, sentences=None if old else used)


def test_a_file_that_grew_is_another_text_set_and_its_calibrated_sentences_are_counted(tmp_path: Path) -> None:
    before = load_texts(write(tmp_path / "t.json", range(40)))
    after = load_texts(write(tmp_path / "t.json", range(60)))
    calibrated = set(before.part("calibrate").sentences["en"])
    measured = after.part("confirm").sentences["en"]
    both = len(calibrated.intersection(measured))
    assert both
    expected = f"of the {len(measured)} sentences of t.json, {both} were calibrated on: not held out"
    assert held_out_of(record_on(before), after, "confirm") == (False, expected)
    searched = len(set(before.part("search").sentences["en"]).intersection(measured))
    _, condition = held_out_of(record_on(before, searched=True), after, "confirm")
    assert condition == (
        f"of the {len(measured)} sentences of t.json, {both} were calibrated on and on {searched} plans were "
        "searched: not held out"
    )


def test_other_sentences_under_the_same_name_are_held_out_and_the_same_under_another_are_not(tmp_path: Path) -> None:
    made_on = load_texts(write(tmp_path / "t.json", range(40)))
    new = load_texts(write(tmp_path / "t.json", range(100, 140)))
    assert held_out_of(record_on(made_on), new, "all") == (True, "")
    copied = load_texts(write(tmp_path / "copy.json", range(20, 60)))
    held_out, condition = held_out_of(record_on(made_on), copied, "all")
    assert held_out is False
    assert condition.startswith("of the 40 sentences of copy.json, ")


def test_one_language_that_was_calibrated_on_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", range(40))
    only = replace(load_texts(path, languages=["he"], reference=None), name="he.json")
    held_out, _ = held_out_of(record_on(only), replace(load_texts(path), sha256="another"), "all")
    assert held_out is False


def test_an_older_record_knows_its_text_set_by_the_checksum(tmp_path: Path) -> None:
    before = load_texts(write(tmp_path / "t.json", range(40)))
    after = load_texts(write(tmp_path / "t.json", range(60)))
    old = record_on(before, old=True)
    assert held_out_of(old, before, "confirm") == (True, "")
    assert held_out_of(old, before, "calibrate")[0] is False
    assert held_out_of(old, after, "confirm") == (
        None,
        f"made on t.json with sha256 {before.sha256[:12]}, and here it has {after.sha256[:12]}: whether t.json shares "
        "sentences with it is not known",
    )
    assert held_out_of(old, replace(after, name="b.json"), "confirm") == (
        None,
        "made on t.json: whether b.json shares sentences with it is not known",
    )


def test_an_older_record_in_other_languages_of_the_same_set_is_recognised() -> None:
    whole, some = load_texts("bundled"), load_texts("bundled", languages=["en", "he"])
    old = record_on(some, old=True)
    assert held_out_of(old, whole, "confirm")[0] is None
    old = replace(old, measurement=samples.measured(en=1.0, he=1.0))
    assert held_out_of(old, whole, "confirm") == (True, "")
    assert held_out_of(old, load_texts("bundled", languages=["en", "fr"]), "confirm") == (True, "")
    assert held_out_of(old, whole, "search")[0] is False


def test_what_no_sentence_was_used_for_is_held_out_whatever_it_is_called(tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path / "t.json", range(40)))
    assert held_out_of(replace(record_on(texts), calibration={}), texts, "calibrate") == (True, "")


def test_digests_hold_texts_and_their_lines_and_can_be_joined() -> None:
    chat = (("user", "Hello?\nIs anyone here?"), ("assistant", " Yes. "))
    digests = sentence_digests(["One.\nTwo.", chat])
    texts = load_texts("bundled", languages=["en"]).take(range(7))
    said = ("One.", "Two.", "One.\nTwo.", "Hello?", "Is anyone here?", "Yes.", "No.")
    used = UsedSentences(calibrated=digests, searched="")
    measured = replace(texts, sentences={"en": said})
    assert (used.calibrated_in(measured), used.searched_in(measured)) == (6, 0)
    joined = join_digests(digests, sentence_digests(["No.", "One."]), "")
    assert UsedSentences(calibrated="", searched=joined).searched_in(measured) == 7
    assert joined == sentence_digests(["No.", "One.\nTwo.", chat])


def test_records_load_with_and_without_digests_and_not_with_broken_ones() -> None:
    record = samples.record()
    assert from_json(ExportRecord, to_json(record), "r").sentences is None
    document = json.loads(to_json(record))
    del document["sentences"]  # as older versions wrote it
    assert from_json(ExportRecord, json.dumps(document), "r") == record
    used = UsedSentences(calibrated=sentence_digests(["One."]), searched="")
    assert from_json(ExportRecord, to_json(replace(record, sentences=used)), "r").sentences == used
    for broken in ("One", "T25l", "???="):
        document["sentences"] = {"calibrated": broken, "searched": ""}
        with pytest.raises(ArtifactError, match="sentences"):
            from_json(ExportRecord, json.dumps(document), "r")


def test_an_export_records_what_it_was_calibrated_on(planted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write(path, range(40))
    calibrated = load_texts(path).part("calibrate")
    quantizer = FairQuantizer.from_pretrained(
        str(planted_model), protect_layers="none", group_size=32, texts=str(path), draws=100
    )
    record = quantizer.save_pretrained(tmp_path / "out")
    assert record.measurement is not None
    assert record.measurement.held_out is True
    assert record.sentences is not None
    assert record.sentences.searched == ""
    # Every language gives as many tokens as the smallest has: of the other, a sentence may be left out.
    assert record.sentences.calibrated_in(calibrated) == len(calibrated)
    assert record.sentences.calibrated_in(load_texts(path).part("confirm")) == 0
    write(path, range(60))
    grown = FairQuantizer.from_pretrained(str(planted_model), texts=str(path), draws=100)
    measured = grown.measure_folder(tmp_path / "out")
    assert measured.held_out is False
    assert " were calibrated on: not held out" in measured.condition
