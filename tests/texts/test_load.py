from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnknownLanguageError
from quant_fairness_plugin.texts import load, load_texts


def write_folder(folder: Path, count: int = 63, languages: tuple[str, ...] = ("en", "de", "he")) -> Path:
    folder.mkdir(parents=True)
    for language in languages:
        (folder / f"{language}.txt").write_text("".join(f"{language} {i}.\n" for i in range(count)), encoding="utf-8")
    return folder


def naive_checksum(ids: list[str], parts: list[str], registers: list[str], sentences: dict[str, list[str]]) -> str:
    fields = [("ids", ids), ("parts", parts), ("registers", registers), ("sentences", dict(sorted(sentences.items())))]
    body = ",".join(f'"{key}":{json.dumps(value, ensure_ascii=False, separators=(",", ":"))}' for key, value in fields)
    return hashlib.sha256(("{" + body + "}").encode("utf-8")).hexdigest()


def test_an_own_set_is_split_into_disjoint_parts(tmp_path: Path) -> None:
    texts = load_texts(write_folder(tmp_path / "own"))
    parts = {part: texts.part(part).ids for part in ("calibrate", "search", "confirm")}
    assert {part: len(ids) for part, ids in parts.items()} == {"calibrate": 14, "search": 25, "confirm": 24}
    assert sorted(sum(parts.values(), ())) == sorted(texts.ids)
    assert texts.part("all").ids == texts.ids
    assert texts.name == "own"
    assert texts.parallel


def test_a_small_set_is_not_split_and_serves_as_every_part(tmp_path: Path) -> None:
    texts = load_texts(write_folder(tmp_path / "own", count=17))
    assert texts.parts == ("all",) * 17
    assert texts.part("search").ids == texts.part("confirm").ids == texts.ids


def test_parts_of_the_file_are_kept(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "part": "confirm" if i else "search", "en": f"Text {i}."} for i in range(33)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_texts(path).parts == ("search",) + ("confirm",) * 32


def test_languages_are_chosen_in_order(tmp_path: Path) -> None:
    texts = load_texts(write_folder(tmp_path / "own"), languages=["iw", "eng"])
    assert texts.languages == ("he", "en")
    assert texts.sentences["he"][62] == "he 62."


def test_a_language_that_the_set_does_not_hold_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    with pytest.raises(UnknownLanguageError, match="text set own has no sentences in fr, sw; it holds de, en, he"):
        load_texts(folder, languages=["en", "fr", "sw"])


def test_the_reference_must_be_there_unless_there_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own", languages=("de", "he"))
    with pytest.raises(ConfigError, match=r"reference language 'en' is not among .* --reference LANG\|none"):
        load_texts(folder)
    assert load_texts(folder, reference=None).languages == ("de", "he")
    assert load_texts(folder, reference="deu").languages == ("de", "he")


def test_repeated_rows_are_left_out_alike_for_every_choice_of_languages(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("One.\nTwo.\nThree.\n", encoding="utf-8")
    (tmp_path / "de.txt").write_text("Eins.\nEins.\nDrei.\n", encoding="utf-8")
    assert load_texts(tmp_path).sentences == {"de": ("Eins.", "Drei."), "en": ("One.", "Three.")}
    assert load_texts(tmp_path, languages=["en"]).sentences == {"en": ("One.", "Three.")}


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    texts = load_texts(write_folder(tmp_path / "own"), languages=["he", "en"])
    plain = {language: list(rows) for language, rows in texts.sentences.items()}
    assert texts.sha256 == naive_checksum(list(texts.ids), list(texts.parts), list(texts.registers), plain)


def test_the_checksum_does_not_depend_on_place_form_or_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    table = tmp_path / "texts.tsv"
    lines = ["he\ten\tde"] + [f"he {i}.\ten {i}.\tde {i}." for i in range(63)]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_texts(table).sha256 == load_texts(folder).sha256 == load_texts(str(folder)).sha256
    assert load_texts(folder, languages=["he", "en", "de"]).sha256 == load_texts(folder).sha256


def test_the_checksum_changes_with_every_part_of_the_content(tmp_path: Path) -> None:
    row = {"id": "a", "part": "search", "register": "news", "en": "One.", "de": "Eins."}
    seen = set()
    for number, change in enumerate(({}, {"id": "b"}, {"part": "confirm"}, {"register": "web"}, {"de": "Eins"})):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row | change), encoding="utf-8")
        seen.add(load_texts(path).sha256)
    seen.add(load_texts(tmp_path / "0.jsonl", languages=["en"]).sha256)
    assert len(seen) == 6


def test_a_folder_named_like_a_built_in_source_is_read_when_given_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "bundled", languages=("en", "tlh"))
    monkeypatch.chdir(tmp_path)
    assert load_texts("./bundled").languages == ("en", "tlh")
    assert load_texts(Path("bundled")).languages == ("en", "tlh")


@pytest.fixture
def bundled_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "parallel.jsonl"
    path.write_text('{"id": "n001", "part": "search", "register": "narrative", "en": "One."}\n', encoding="utf-8")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".sha256").write_text(f"{checksum}  parallel.jsonl\n", encoding="ascii")
    monkeypatch.setattr(load, "BUNDLED", path)
    return path


def test_the_bundled_set_is_loaded_by_name(bundled_copy: Path) -> None:
    texts = load_texts()
    assert (texts.name, texts.ids, texts.registers) == ("bundled", ("n001",), ("narrative",))


def test_one_altered_byte_of_the_bundled_set_is_noticed(bundled_copy: Path) -> None:
    bundled_copy.write_bytes(bundled_copy.read_bytes().replace(b"One", b"one"))
    with pytest.raises(ArtifactError, match=r"parallel\.jsonl: altered, its sha256 is .* install again"):
        load_texts("bundled")


@pytest.mark.parametrize("name", ["parallel.jsonl", "parallel.sha256"])
def test_a_missing_bundled_file_is_named(bundled_copy: Path, name: str) -> None:
    bundled_copy.with_name(name).unlink()
    with pytest.raises(ArtifactError, match=f"cannot be read .*{name}.* install again"):
        load_texts("bundled")


def test_an_empty_checksum_file_does_not_pass_for_a_checksum(bundled_copy: Path) -> None:
    bundled_copy.with_suffix(".sha256").write_text("", encoding="ascii")
    with pytest.raises(ArtifactError, match="altered"):
        load_texts("bundled")


def test_torch_is_never_imported(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    code = (
        "import sys; from quant_fairness_plugin.texts import load_texts; load_texts(sys.argv[1]); "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
