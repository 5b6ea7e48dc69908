from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from quant_fairness_plugin.texts import documents, load, load_texts

SCRIPT = Path(__file__).parents[2] / "examples" / "build_text_set.py"


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_text_set", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for language in ("de", "en", "iw"):
        lines = [f"{language} line {i}.\n" for i in range(1, 181)]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{language}.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "in"


def test_a_row_holds_id_part_register_and_english_first(builder: ModuleType, folder: Path, tmp_path: Path) -> None:
    assert builder.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "parallel.jsonl").read_text("utf-8").splitlines()]
    assert list(rows[0]) == ["id", "part", "register", "en", "de", "he"]
    assert [row["id"] for row in rows] == [f"n{i:03d}" for i in range(1, 91)] + [f"e{i:03d}" for i in range(1, 91)]
    assert [row["register"] for row in rows] == ["narrative"] * 90 + ["everyday"] * 90
    assert [row["he"] for row in rows] == [f"iw line {i}." for i in range(1, 181)]
    assert Counter((row["register"], row["part"]) for row in rows) == {
        (register, part): count
        for register in ("narrative", "everyday")
        for part, count in (("calibrate", 20), ("search", 35), ("confirm", 35))
    }


def test_the_result_is_loaded_with_its_checksum(
    builder: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.build(folder, tmp_path / "out", 0)
    target = tmp_path / "out" / "parallel.jsonl"
    checksum = hashlib.sha256(target.read_bytes()).hexdigest()
    assert (tmp_path / "out" / "parallel.sha256").read_text("ascii") == f"{checksum}  parallel.jsonl\n"
    monkeypatch.setattr(load, "BUNDLED", target)
    texts = load_texts("bundled", languages=["he", "en"])
    assert [len(texts.part(part)) for part in ("calibrate", "search", "confirm")] == [40, 70, 70]


def test_the_seed_decides_and_a_corrected_sentence_moves_nothing(
    builder: ModuleType, folder: Path, tmp_path: Path
) -> None:
    def parts(seed: int) -> list[str]:
        builder.build(folder, tmp_path / "out", seed)
        lines = (tmp_path / "out" / "parallel.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["part"] for line in lines]

    first = parts(0)
    english = folder / "en.txt"
    english.write_text(english.read_text("utf-8").replace("en line 5.", "Corrected."), encoding="utf-8")
    assert parts(0) == first
    assert parts(1) != first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("de line 3.\n", "", "different numbers of sentences"),
        ("de line 3.\n", "\n", "sentence 3, de: the text is empty"),
        ("de line 3.\n", "de line 150.\n", "de.txt: the same sentence in lines [[3, 150]]"),
        ("de line 3.\n", "de\x00\n", "control character U+0000"),
    ],
)
def test_a_faulty_file_is_refused_and_nothing_written(
    builder: ModuleType,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    message: str,
) -> None:
    german = folder / "de.txt"
    german.write_text(german.read_text("utf-8").replace(old, new), encoding="utf-8")
    assert builder.main([str(folder), "--out", str(tmp_path / "out")]) == 5
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_another_number_of_lines_in_all_files_is_refused(
    builder: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:179]), encoding="utf-8")
    assert builder.main([str(folder), "--out", str(tmp_path / "out")]) == 5
    assert "179 lines in each file; expected 180" in capsys.readouterr().err


def test_a_folder_without_english_is_refused(
    builder: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "en.txt").unlink()
    assert builder.main([str(folder), "--out", str(tmp_path / "out")]) == 5
    assert "no en.txt" in capsys.readouterr().err


def test_documents_are_built_again_from_their_lines(builder: ModuleType, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in documents.BUNDLED_DOCUMENTS.read_text("utf-8").strip().split("\n")]
    (tmp_path / "in").mkdir()
    for language in {row["language"] for row in rows}:
        lines = [row["text"] + "\n" for row in rows if row["language"] == language]
        (tmp_path / "in" / f"{language}.txt").write_text("".join(lines), encoding="utf-8")
    assert builder.main([str(tmp_path / "in"), "--documents", "--out", str(tmp_path)]) == 0
    for suffix in (".jsonl", ".sha256"):
        stored = documents.BUNDLED_DOCUMENTS.with_suffix(suffix)
        assert (tmp_path / stored.name).read_bytes() == stored.read_bytes()

    (tmp_path / "in" / "de.txt").write_text("Ein Satz.\n", encoding="utf-8")
    assert builder.main([str(tmp_path / "in"), "--documents", "--out", str(tmp_path)]) == 5
