"""What is kept of the fuzzing: a row for each round, the files that reached new code, and what the page says."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fuzz
from tests.fuzz import reach

UNKNOWN = b'{"nonsense": 1}'


def stored(*executions: int) -> list[dict[str, Any]]:
    return [
        {
            "targets": {name: {"executions": each, "fault": None} for name in fuzz.TARGETS},
            "executions": each * len(fuzz.TARGETS), "faults": 0, "seconds_per_target": 5, "revision": "abc",
        }
        for each in executions
    ]  # fmt: skip


def test_the_page_counts_what_is_stored() -> None:
    rows = stored(800_000)
    rows[0]["targets"]["sweep"]["executions"] = 7
    assert "Faults: none." in fuzz.said_of(rows)
    rows[0]["targets"]["plan"]["fault"] = "KeyError: 'a'"
    assert "Faults: `plan` at abc (KeyError: 'a')." in fuzz.said_of(rows)
    assert "10,400,000 executions," in fuzz.said_of(rows)
    assert "Ten million executions once: reached." in fuzz.said_of(rows)
    assert "at least 5 s; the fewest executions are 7, of `sweep`" in fuzz.said_of(rows)
    assert "Ten million executions once: not reached: 9,999,935 are missing." in fuzz.said_of(stored(1, 4))


def test_a_target_that_a_row_left_out_has_nothing_of_it() -> None:
    rows = stored(10, 10)
    del rows[1]["targets"]["card"]
    assert "at least 5 s; the fewest executions are 10, of `card`" in fuzz.said_of(rows)


def test_every_round_adds_a_row_and_begins_with_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int, int]] = []

    def found(name: str, limits: tuple[int, int, int], atheris: Path, kept: Path) -> dict[str, Any]:
        _, seed, _ = limits
        begun.append((name, seed, len(list(kept.iterdir()))))
        (kept / f"found-{seed}").touch()
        if seed == 3:
            raise KeyboardInterrupt
        return {"executions": 5, "kept": seed, "fault": None}

    monkeypatch.setattr(fuzz, "fuzz", found)
    monkeypatch.setattr(fuzz, "ROWS", tmp_path / "rows.jsonl")
    keep = tmp_path / "kept"
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--rounds", "9", "--target", "card", "--keep", str(keep)])
    with pytest.raises(KeyboardInterrupt):
        fuzz.main()
    assert begun == [("card", 1, 0), ("card", 2, 1), ("card", 3, 2)]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["executions"], row["seed"], row["targets"]["card"]["kept"]) for row in rows] == [(5, 1, 1), (5, 2, 2)]
    assert {row["command"] for row in rows} == {"python benchmarks/fuzz.py --seconds 60 --target card --keep FOLDER"}
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text(encoding="utf-8")


def test_the_files_that_minimise_takes_lie_in_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(logging, "disable", lambda level: None)  # would hold for every test after this one
    (tmp_path / "corpus" / "config-json").mkdir(parents=True)
    (tmp_path / "kept" / "config-json").mkdir(parents=True)
    for name, content in (("a", b"[ ]"), ("b", b"[]"), ("c", UNKNOWN)):
        (tmp_path / "kept" / "config-json" / name).write_bytes(content)
    monkeypatch.setattr(reach, "seeds", lambda name: [b"{"])
    fuzz.minimise(tmp_path / "kept", ["config-json"])
    taken = {path.name: path.read_bytes() for path in (tmp_path / "corpus" / "config-json").iterdir()}
    assert taken == {fuzz.content_name(content): content for content in (b"[]", UNKNOWN)}
