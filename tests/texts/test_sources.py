from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.errors import ArtifactError, ConfigError, QuantFairnessError, UnknownLanguageError
from quant_fairness_plugin.texts.sources import read_path


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def test_a_folder_holds_one_file_per_language(tmp_path: Path) -> None:
    write(tmp_path / "iw.txt", "שלום.\nערב טוב.\n")
    write(tmp_path / "en.txt", "Peace.\nGood evening.")
    write(tmp_path / "README.md", "not a language")
    write(tmp_path / ".hidden.txt", "not a language")
    (tmp_path / "old.txt").mkdir()
    raw = read_path(tmp_path)
    assert raw.sentences == {"en": ("Peace.", "Good evening."), "he": ("שלום.", "ערב טוב.")}
    assert raw.ids == ("s0001", "s0002")
    assert raw.registers == ("", "")
    assert raw.parts is None


def test_endings_in_capitals_are_read_and_other_files_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "en.txt", "Peace.\n")
    write(tmp_path / "HE.TXT", "שלום.\n")
    for name in ("a.csv", "b.md", "c.txt.bak", "d.jsonl", "e.pdf", "f.rtf"):
        write(tmp_path / name, "x")
    (tmp_path / "zh").mkdir()
    assert read_path(tmp_path).sentences == {"en": ("Peace.",), "he": ("שלום.",)}
    assert "not read, as no text by their names: a.csv, b.md, c.txt.bak, d.jsonl, e.pdf and 2 more" in caplog.text


@pytest.mark.parametrize("blank", ["\n", "\n\n \n", "\r\n", "\t\n"])
@pytest.mark.parametrize(
    ("name", "content"),
    [("t.tsv", "en\tde\nOne.\tEins.\n"), ("t.jsonl", '{"en": "One.", "de": "Eins."}\n'), ("en.txt", "One.\n")],
)
def test_empty_lines_at_the_end_are_no_sentences(name: str, content: str, blank: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content + blank)
    raw = read_path(path.parent if path.suffix == ".txt" else path)
    assert raw.sentences["en"] == ("One.",)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "en.txt", "One.\nTwo.\n")
    write(tmp_path / "windows" / "en.txt", b"\xef\xbb\xbfOne.\r\nTwo.\r\n")
    assert read_path(tmp_path / "windows") == read_path(tmp_path / "plain")


def test_a_line_separator_inside_a_sentence_does_not_shift_the_others(tmp_path: Path) -> None:
    write(tmp_path / "en.txt", "One\u2028and a half.\nTwo.\n")
    assert read_path(tmp_path).sentences["en"] == ("One\u2028and a half.", "Two.")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no <lang>\.txt file in this folder"),
        ({"en.txt": b""}, r"no sentences in en"),
        ({"en.txt": b"a\nb\n", "de.txt": b"a\n"}, r"different numbers of sentences \(de 1, en 2\)"),
        ({"en.txt": b"a\n\nb\n"}, r"sentence 2, en: the text is empty"),
        ({"en.txt": b"a\nb\xffc\n"}, r"en\.txt line 2: byte 0xff is not UTF-8"),
        ({"en.txt": "aé".encode("latin-1")}, r"en\.txt line 1: byte 0xe9 is not UTF-8"),
        ({"en.txt": "a\n".encode("utf-16")}, r"en\.txt line 1: byte 0xff is not UTF-8"),
        ({"en.txt": b"\xed\xa0\x80"}, r"en\.txt line 1: byte 0xed is not UTF-8"),
        ({"en.txt": b"a\nb\x00\n"}, r"sentence 2, en: control character U\+0000"),
        ({"he.txt": b"a\n", "iw.txt": b"b\n"}, r"he occurs twice \(once as 'iw'\)"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_place(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(ArtifactError, match=message):
        read_path(tmp_path)


def test_a_file_not_named_by_a_language_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "english.txt", "a\n")
    with pytest.raises(UnknownLanguageError, match=r"english\.txt: 'english' is not the tag of a language"):
        read_path(tmp_path)


def test_the_seeds_format_of_one_text_per_language(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.json", json.dumps({"en": "The fox.", "he": "השועל.", "id": "Rubah."}))
    assert read_path(path).sentences == {"en": ("The fox.",), "he": ("השועל.",), "id": ("Rubah.",)}


def test_the_seeds_format_of_several_texts_per_language(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.json", json.dumps({"en": ["One.", "Two."], "de": ["Eins.", "Zwei."]}))
    assert read_path(path).sentences == {"en": ("One.", "Two."), "de": ("Eins.", "Zwei.")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"not valid JSON"),
        ("{", r"not valid JSON"),
        ("[" * 100_000, r"not valid JSON"),
        ("9" * 10_000, r"not valid JSON"),
        ('["a"]', r"list instead of an object"),
        ("{}", r"no sentences in any language"),
        ('{"en": []}', r"no sentences in en"),
        ('{"en": ""}', r"sentence 1, en: the text is empty"),
        ('{"en": 3}', r"sentence 1, en: int instead of text"),
        ('{"en": {"a": "b"}}', r"sentence 1, en: dict instead of text"),
        ('{"en": ["a", null]}', r"sentence 2, en: NoneType instead of text"),
        ('{"en": "\\ud83d"}', r"lone surrogate U\+D83D"),
        ('{"en": "a\\u0000"}', r"sentence 1, en: control character U\+0000"),
        ('{"en": ["a", "b"], "de": "a"}', r"different numbers of sentences \(en 2, de 1\)"),
        ('{"en": "a", "en": "b"}', r"'en' is there twice"),
        ('{"en": "a", "eng": "b"}', r"en occurs twice \(once as 'eng'\)"),
    ],
)
def test_a_malformed_json_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "texts.json", text)
    with pytest.raises(ArtifactError, match=message):
        read_path(path)


def test_a_json_file_that_is_too_large_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "texts.json", json.dumps({"en": "The fox.", "he": "השועל."}))
    monkeypatch.setattr("quant_fairness_plugin.texts.lines.MOST_BYTES", 20)
    with pytest.raises(ArtifactError, match=r"JSON of more than 20 characters; write a row a line in a \.jsonl file"):
        read_path(path)


def test_jsonl_rows_bring_ids_parts_and_registers(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "texts.jsonl",
        {"id": "n1", "part": "search", "register": "narrative", "en": "One.", "ind": "Satu."},
        {"id": 2, "part": "confirm", "en": "Two.", "ind": "Dua."},
    )
    raw = read_path(path)
    assert raw.sentences == {"en": ("One.", "Two."), "id": ("Satu.", "Dua.")}
    assert raw.ids == ("n1", "2")
    assert raw.parts == ("search", "confirm")
    assert raw.registers == ("narrative", "")


def test_jsonl_rows_may_hold_nothing_but_texts(tmp_path: Path) -> None:
    raw = read_path(jsonl(tmp_path / "texts.jsonl", {"en": "One.", "de": "Eins."}, {"de": "Zwei.", "en": "Two."}))
    assert raw.sentences == {"en": ("One.", "Two."), "de": ("Eins.", "Zwei.")}
    assert raw.ids == ("s0001", "s0002")
    assert raw.parts is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", r"no sentences; expected one row per sentence"),
        ('{"id": "a"}', r"no sentences in any language"),
        ('{"en": "a"}\n\n{"en": "b"}', r"line 2: not valid JSON"),
        ('{"en": "a"}\n[1]', r"line 2: not an object"),
        ('{"en": "a", "de": "b"}\n{"en": "c"}', r"line 2: 'de' is in this row or in the first one, but not in both"),
        ('{"en": "a"}\n{"en": "c", "de": "b"}', r"line 2: 'de' is in this row or in the first one"),
        ('{"en": "a"}\n{"en": " "}', r"line 2, en: the text is empty"),
        ('{"id": "x", "en": "a"}\n{"id": "x", "en": "b"}', r"id 'x' occurs more than once"),
        ('{"id": "1", "en": "a"}\n{"id": 1, "en": "b"}', r"id '1' occurs more than once"),
        ('{"id": "x", "en": "a"}\n{"en": "b"}', r"an id is missing, empty or no text"),
        ('{"id": "", "en": "a"}', r"an id is missing, empty or no text"),
        ('{"id": NaN, "en": "a"}', r"line 1: not valid JSON \(nan is no number"),
        ('{"part": "test", "en": "a"}', r"line 1: part 'test'; accepted are calibrate, search, confirm, all"),
        ('{"part": "search", "en": "a"}\n{"en": "b"}', r"line 2: part None; accepted are"),
        ('{"part": ["search"], "en": "a"}', r"line 1: part \['search'\]; accepted are"),
        ('{"register": 3, "en": "a"}', r"line 1: register 3 is no text"),
        ('{"en": "a", "iw": "b", "he": "c"}', r"he occurs twice"),
    ],
)
def test_a_malformed_jsonl_file_is_refused_with_the_line(tmp_path: Path, lines: str, message: str) -> None:
    path = write(tmp_path / "texts.jsonl", lines)
    with pytest.raises(ArtifactError, match=message):
        read_path(path)


def test_a_column_that_is_no_language_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "texts.jsonl", {"en": "a", "source": "web"})
    with pytest.raises(UnknownLanguageError, match=r"texts\.jsonl: 'source' is not the tag of a language"):
        read_path(path)


def test_a_table_names_its_languages_in_the_first_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "texts.TSV", 'id\tregister\ten\tde\r\n1\tnews\t"One", he said.\t„Eins“.\r\n2\tnews\tTwo.\tZwei.\r\n'
    )
    raw = read_path(path)
    assert raw.sentences == {"en": ('"One", he said.', "Two."), "de": ("„Eins“.", "Zwei.")}
    assert raw.ids == ("1", "2")
    assert raw.registers == ("news", "news")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no sentences; expected one row"),
        ("en\tde\n", r"no sentences; expected one row"),
        ("en\tde\na\tb\tc\n", r"line 2: 3 cells; the first line names 2 columns"),
        ("en\tde\na\tb\n\na\tb\n", r"line 3: 1 cells; the first line names 2 columns"),
        ("en\tde\na\t\n", r"line 2, de: the text is empty"),
        ("en\ten\na\tb\n", r"column 'en' occurs twice"),
    ],
)
def test_a_malformed_table_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "texts.tsv", text)
    with pytest.raises(ArtifactError, match=message):
        read_path(path)


def test_a_source_that_is_not_there_names_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"bundeld: no such text set; accepted are 'bundled', a \.json, \.jsonl, \.tsv"
    ):
        read_path(tmp_path / "bundeld")
    with pytest.raises(ArtifactError, match=r"gone\.json: no such text set"):
        read_path(tmp_path / "gone.json")


def test_another_kind_of_file_names_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"texts\.csv: not a kind of text file .* \.json, \.jsonl, \.tsv files"):
        read_path(write(tmp_path / "texts.csv", "en,de\n"))


def test_a_device_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "texts.json").symlink_to(os.devnull)  # a pipe would do the same, but hang where the check is missing
    with pytest.raises(ArtifactError, match="no such text set"):
        read_path(tmp_path / "texts.json")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "texts.tsv", "en\na\n")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # file modes do not stop root, who may run this test
    with pytest.raises(ArtifactError, match=r"texts\.tsv: cannot be read \(Permission denied\)"):
        read_path(path)


def test_every_message_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.json", json.dumps({"en\n\x1b[31m" + "x" * 10_000: "a"}))
    with pytest.raises(QuantFairnessError, match=re.escape(r"'en\n\x1b[31m...xx")) as caught:
        read_path(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400
