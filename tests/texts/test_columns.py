"""Columns whose names are languages and something else: what they hold decides, or they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.columns import column_kind
from quant_fairness_plugin.texts.load import load_texts
from quant_fairness_plugin.texts.sources import read_path

ENGLISH = ["The fox runs home.", "A dog sleeps here.", "Three birds sing loudly.", "They walk to town."]
INDONESIAN = ["Rubah itu berlari pulang.", "Seekor anjing tidur di sini.", "Tiga burung bernyanyi.", "Mereka berjalan."]


def table(path: Path, **columns: list[Any]) -> Path:
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if path.suffix == ".tsv":
        lines = ["\t".join(columns), *("\t".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["id", "ID", " id"])
@pytest.mark.parametrize("kind", ["t.tsv", "t.jsonl"])
def test_a_column_id_of_sentences_is_indonesian_and_said(
    name: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = read_path(table(tmp_path / kind, en=ENGLISH, **{name: INDONESIAN}))
    assert raw.sentences == {"en": tuple(ENGLISH), "id": tuple(INDONESIAN)}
    assert raw.ids == ("s0001", "s0002", "s0003", "s0004")
    assert f"column {name!r} is taken for Indonesian" in caplog.text


def test_a_table_of_indonesian_alone_is_read(tmp_path: Path) -> None:
    assert read_path(table(tmp_path / "t.tsv", id=INDONESIAN)).sentences == {"id": tuple(INDONESIAN)}


@pytest.mark.parametrize(
    "values",
    [[1, 2, 3, 4], ["1", "2", "3", "4"], ["n-1", "n-2", "n-3", "n-4"], ["Gen 1:1", "Gen 1:2", "Gen 1:3", "Gen 1:4"],
     ["fox", "dog", "birds", "town"], ["a", "b", "c", "d"]],
)  # fmt: skip
@pytest.mark.parametrize("name", ["id", "ID"])
def test_a_column_id_of_identifiers_names_the_rows_and_is_said(
    name: str, values: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = read_path(table(tmp_path / "t.jsonl", **{name: values, "part": ["all"] * 4, "en": ENGLISH}))
    assert raw.sentences == {"en": tuple(ENGLISH)}
    assert raw.ids == tuple(map(str, values))
    assert f"columns not taken for languages: {name} (row identifiers), part" in caplog.text


@pytest.mark.parametrize(
    ("identifiers", "english"),
    [(["Ya", "Tidak", "Halo", "Baik"], ["Yes", "No", "Hello", "Good"]), (["news item"] * 4, ENGLISH)],
)
def test_a_column_id_that_could_be_either_is_refused_with_the_way_out(
    identifiers: list[str], english: list[str], tmp_path: Path
) -> None:
    path = table(tmp_path / "t.tsv", id=identifiers, en=english)
    with pytest.raises(
        ArtifactError, match="column 'id' could hold Indonesian or row identifiers .* 'ind' .* 'row_id'"
    ):
        read_path(path)
    assert read_path(table(tmp_path / "t.tsv", ind=identifiers, en=english)).sentences["id"] == tuple(identifiers)
    named = read_path(table(tmp_path / "t.tsv", row_id=["p", "q", "r", "s"], id=identifiers, en=english))
    assert named.sentences["id"] == tuple(identifiers)
    assert named.ids == ("p", "q", "r", "s")


def test_beside_ind_a_column_id_names_the_rows(tmp_path: Path) -> None:
    raw = read_path(table(tmp_path / "t.tsv", id=["p", "q", "r", "s"], ind=INDONESIAN))
    assert (raw.ids, raw.sentences) == (("p", "q", "r", "s"), {"id": tuple(INDONESIAN)})


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("no", ["1", "2", "3", "4"], "numbers, identifiers or yes and no"),
        ("is", ["true", "false", "true", "True"], "numbers, identifiers or yes and no"),
        ("src", ["web-01", "web-02", "web-03", "web-04"], "numbers, identifiers or yes and no"),
        ("set", ["train"] * 4, "one word in every row"),
    ],
)
def test_a_column_that_is_a_language_by_its_name_alone_is_refused(
    name: str, values: list[str], what: str, tmp_path: Path
) -> None:
    path = table(tmp_path / "t.tsv", en=ENGLISH, **{name: values})
    with pytest.raises(ArtifactError, match=f"column '{name}' is a language by its name, and holds {what}"):
        read_path(path)


def test_norwegian_and_tags_with_scripts_and_regions_are_languages(tmp_path: Path) -> None:
    columns = {"no": INDONESIAN, "zh-Hant": [f"{text} a" for text in ENGLISH], "pt_BR": ENGLISH}
    assert tuple(read_path(table(tmp_path / "t.tsv", **columns)).sentences) == ("no", "zh-Hant", "pt")


def test_equal_and_quoted_columns_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_path(table(tmp_path / "t.tsv", en=ENGLISH, fr=ENGLISH, de=[f'"{text}"' for text in INDONESIAN]))
    assert "en and fr hold the same sentences" in caplog.text
    assert "every cell of column 'de' is in quotes" in caplog.text


def test_an_empty_cell_of_indonesian_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="line 3, id: the text is empty"):
        read_path(table(tmp_path / "t.tsv", en=ENGLISH, id=[INDONESIAN[0], "", *INDONESIAN[2:]]))


def test_the_bundled_columns_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    load_texts("bundled", languages=["en"])
    assert not caplog.text


def test_short_answers_among_sentences_are_sentences() -> None:
    values = ["Ya.", "Tidak.", "Terima kasih banyak.", "Sampai jumpa besok."]
    assert column_kind(values, [["Yes.", "No.", "Thank you very much.", "See you tomorrow."]]) == "sentences"
