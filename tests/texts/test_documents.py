from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import Documents
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts import documents
from quant_fairness_plugin.texts.documents import check_apart, documents_of, load_documents
from quant_fairness_plugin.texts.load import load_texts

HELLO = (("user", "Hello?"), ("assistant", "Yes."))
ROWS = [
    {"language": "en", "text": "One line.\nAnother."},
    {"language": "eng", "text": "One line.\nAnother."},
    {"language": "iw", "text": "שלום"},
    {"language": "en", "messages": [{"role": role, "content": said} for role, said in HELLO]},
]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def rows_file(tmp_path: Path, *rows: object) -> Path:
    return write(tmp_path / "own.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_rows_say_their_language_and_need_not_be_parallel(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_documents(rows_file(tmp_path, *ROWS))
    assert found.texts == {"en": ("One line.\nAnother.", HELLO), "he": ("שלום",)}
    assert found.name == "own.jsonl"
    assert found.chats == ("en",)
    assert len(found) == 3
    assert "left out 1 of 4 documents that repeat an earlier one" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,language\n"One, two.",en\n"Zwei\nDrei",de\nUne,de\n'),
        ("b.csv", 'en,de\n"One, two.","Zwei\nDrei"\n,Une\n'),
        ("c.json", json.dumps({"en": "One, two.", "de": ["Zwei\nDrei", "Une"]})),
    ],
)
def test_tables_and_objects_hold_documents_of_any_number(name: str, content: str, tmp_path: Path) -> None:
    found = load_documents(write(tmp_path / name, content))
    assert found.texts == {"en": ("One, two.",), "de": ("Zwei\nDrei", "Une")}


def test_a_tab_table_takes_quotes_as_they_are(tmp_path: Path) -> None:
    found = load_documents(write(tmp_path / "a.tsv", 'language\ttext\nen\t"One," he said.\n'))
    assert found.texts == {"en": ('"One," he said.',)}


def test_a_folder_holds_lines_rows_and_files(tmp_path: Path) -> None:
    write(tmp_path / "en.txt", "One.\n\nTwo.\n")
    write(tmp_path / "de" / "brief.txt", "Lieber\nHerr")
    write(tmp_path / "de" / "zettel.txt", "Milch")
    write(tmp_path / "fr.jsonl", '{"text": "Un."}\n')
    write(tmp_path / "README.md", "not text")
    found = load_documents(tmp_path)
    assert found.texts == {"de": ("Lieber\nHerr", "Milch"), "en": ("One.", "Two."), "fr": ("Un.",)}


def test_a_folder_takes_endings_in_capitals_and_names_what_it_does_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "EN.TXT", "One.")
    write(tmp_path / "fr.JSONL", '{"text": "Un."}')
    write(tmp_path / "de" / "BRIEF.TXT", "Herr")
    write(tmp_path / "de" / "notiz.md", "x")
    write(tmp_path / "images" / "one.png", "x")
    write(tmp_path / "he.csv", "x")
    assert load_documents(tmp_path).texts == {"en": ("One.",), "de": ("Herr",), "fr": ("Un.",)}
    assert "not read, as no text by their names: he.csv, notiz.md, images/" in caplog.text


COLUMNS = {
    "en": ["The fox runs.", "A dog sleeps.", "Birds sing."],
    "he": ["השועל רץ.", "כלב ישן.", ""],
}


def table(path: Path, columns: dict[str, list[str]]) -> Path:
    cut = "," if path.suffix.lower() == ".csv" else "\t"
    rows = [columns, *zip(*columns.values(), strict=True)]
    return write(path, "".join(cut.join(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "T.CSV"])
def test_a_column_of_row_numbers_is_no_indonesian(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = load_documents(table(tmp_path / name, {"id": ["1", "2", "3"], "register": ["a", "b", "c"]} | COLUMNS))
    assert found.languages == ("en", "he")
    assert "columns not taken for languages: id (row identifiers), register" in caplog.text
    some = {"id": ["Rubah itu berlari.", "", "Tiga burung bernyanyi."]}
    assert load_documents(table(tmp_path / name, some | COLUMNS)).texts["id"] == tuple(some["id"][::2])
    assert "column 'id' is taken for Indonesian" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"no": ["1", "2", "3"]}, "column 'no' is a language by its name, and holds numbers"),
        ({"src": ["wiki", "wiki", "wiki"]}, "column 'src' is a language by its name, and holds one word in every row"),
        ({"src": ["wiki", "", "wiki"], "is": ["yes", "no", "no"]}, "column 'is' is a language by its name"),
        ({"iw": ["a b", "c d", "e f"]}, r"he occurs twice \(once as 'he'\); keep one of them"),
        ({"id": ["news item"] * 3}, "column 'id' could hold Indonesian or row identifiers"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_columns_that_hold_no_documents_are_refused(
    columns: dict[str, list[str]], message: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_documents(table(tmp_path / f"t.{kind}", columns | COLUMNS))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_column_that_is_there_twice_is_refused(name: str, tmp_path: Path) -> None:
    cut = "," if name.endswith("csv") else "\t"
    rows = [["en", "he", "en"], ["One.", "שלום", "Un."]]
    with pytest.raises(ArtifactError, match="column 'en' occurs twice; name each column once"):
        load_documents(write(tmp_path / name, "\n".join(map(cut.join, rows))))


def test_keys_and_files_that_hold_numbers_are_refused_too(tmp_path: Path) -> None:
    for content in ({"en": ["One."], "no": ["1", "2"]}, {"he": ["a b"], "iw": ["c d"]}):
        with pytest.raises(ArtifactError, match="is a language by its name|he occurs twice"):
            load_documents(write(tmp_path / "t.json", json.dumps(content)))
    write(tmp_path / "folder" / "no.txt", "1\n2\n3\n")
    with pytest.raises(ArtifactError, match="column 'no' is a language by its name"):
        load_documents(tmp_path / "folder")


@pytest.mark.parametrize("blank", ["\n", "\n\n \n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "en,de\nOne.,Eins.\n"), ("t.tsv", "en\tde\nOne.\tEins.\n"), ("l.csv", "language,text\nen,One.\n"),
        ("t.jsonl", '{"language": "en", "text": "One."}\n'), ("t.json", '{"en": "One."}\n'), ("en.txt", "One.\n"),
    ],
)  # fmt: skip
def test_empty_lines_at_the_end_are_no_documents(name: str, content: str, blank: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content + blank)
    assert load_documents(path.parent if path.suffix == ".txt" else path).texts["en"] == ("One.",)


def test_rows_of_other_parts_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = {"part": ["calibrate", "search", "all"]}
    assert load_documents(table(tmp_path / "t.csv", parts | COLUMNS)).texts["en"] == ("The fox runs.", "Birds sing.")
    assert "left out 1 of 3 rows, whose part is not calibrate" in caplog.text
    long = parts | {"language": ["en"] * 3, "text": COLUMNS["en"]}
    assert load_documents(table(tmp_path / "l.csv", long)).texts == {"en": ("The fox runs.", "Birds sing.")}


def test_a_parallel_set_gives_its_calibrate_part(tmp_path: Path) -> None:
    rows = [{"en": f"Sentence {i}.", "de": f"Satz {i}."} for i in range(9)]
    assert len(load_documents(rows_file(tmp_path, *rows)).texts["de"]) == 9


def test_the_bundled_documents_follow_the_bundled_sentences() -> None:
    sentences = load_texts("bundled", reference=None).part("calibrate").sentences
    bundled = load_documents("bundled")
    assert bundled.texts.keys() == sentences.keys()
    for language, rows in bundled.texts.items():
        more = rows[len(sentences[language]) :]
        assert rows[: len(sentences[language])] == sentences[language]
        assert len(more) == len(set(more)) == 60
        assert sum(map(len, more)) > 5 * sum(map(len, sentences[language]))
    some = load_documents("bundled", languages=["he", "en"])
    assert some.texts == {name: bundled.texts[name] for name in ("en", "he")}
    check_apart(bundled, load_texts("bundled", reference=None))


def test_the_bundled_sentences_bring_their_documents_only_as_a_whole() -> None:
    texts = load_texts("bundled", languages=["en", "he"])
    brought = documents_of(texts)
    assert brought.texts == load_documents("bundled", languages=["en", "he"]).texts
    assert brought.enough == 2048
    some = texts.take([i for i, part in enumerate(texts.parts) if part != "calibrate" or i % 2])
    assert documents_of(some) == Documents.of(some)
    other = replace(texts, name="mine.jsonl")
    assert documents_of(other) == Documents.of(other)


def test_altered_bundled_documents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "documents.jsonl"
    copy.write_bytes(documents.BUNDLED_DOCUMENTS.read_bytes() + b"\n")
    copy.with_suffix(".sha256").write_bytes(documents.BUNDLED_DOCUMENTS.with_suffix(".sha256").read_bytes())
    monkeypatch.setattr(documents, "BUNDLED_DOCUMENTS", copy)
    with pytest.raises(ArtifactError, match="altered, its sha256 is"):
        load_documents("bundled")


def test_the_checksum_is_that_of_the_text(tmp_path: Path) -> None:
    sums = [load_documents(rows_file(tmp_path, *ROWS[:n])).sha256 for n in (1, 2, 3, 4)]
    assert sums[0] == sums[1]
    assert len(set(sums)) == 3
    assert load_documents(rows_file(tmp_path, *ROWS), languages=["en"]).sha256 not in sums


def test_languages_can_be_chosen_and_one_must_be_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = rows_file(tmp_path, *ROWS)
    assert load_documents(path, languages=["he", "fr"]).languages == ("he",)
    assert "own.jsonl: not calibrated on, as not measured: en" in caplog.text
    with pytest.raises(UnknownLanguageError, match=r"own.jsonl has no text in fr to calibrate on; it has en, he"):
        load_documents(path, languages=["fr"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"language": "en"}, r"line 1: expected an object with 'text' or 'messages'"),
        ({"language": "en", "text": "a", "messages": []}, "one of the two"),
        ({"language": 5, "text": "a"}, "language 5 is no language tag"),
        ({"language": "en", "text": " "}, "line 1: the text is empty"),
        ({"language": "en", "messages": []}, "a conversation without messages"),
        ({"language": "en", "messages": [{"role": "tool", "content": "a"}]}, "no object with a 'role'"),
        ({"language": "en", "messages": [{"role": "user", "content": "\u0000"}]}, "line 1, user: control character"),
        ({"language": "en", "messages": ["hello"]}, "no object with a 'role'"),
    ],
)
def test_what_is_no_document_is_refused_with_its_place(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_documents(rows_file(tmp_path, row))


def test_a_broken_table_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"row 2: 1 cells; the first line names 2 columns"):
        load_documents(write(tmp_path / "a.csv", "language,text\nen\n"))
    with pytest.raises(ArtifactError, match="not a table of comma-separated values"):
        load_documents(write(tmp_path / "b.csv", 'language,text\nen,"open\n'))
    with pytest.raises(ConfigError, match=r"accepted are \.json, \.jsonl, \.csv, \.tsv files and folders"):
        load_documents(write(tmp_path / "c.pdf", "%PDF"))
    with pytest.raises(ArtifactError, match="no text to calibrate on"):
        load_documents(write(tmp_path / "empty" / "note.md", "x").parent)


def test_sentences_that_are_measured_on_are_not_calibrated_on() -> None:
    texts = load_texts("bundled", languages=["en", "he"])
    sentence = texts.part("confirm").sentences["he"][3]
    both = Documents(name="own", texts={"he": ("קודם\n" + sentence,)}, sha256="")
    with pytest.raises(ConfigError, match="own holds 1 of the sentences that bundled measures on"):
        check_apart(both, texts)
    chat = Documents(name="own", texts={"he": ((("user", sentence),),)}, sha256="")
    with pytest.raises(ConfigError, match="no figure would be held out"):
        check_apart(chat, texts)
    check_apart(Documents.of(texts), texts)
