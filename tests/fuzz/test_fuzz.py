"""A slice of the fuzzing that `make fuzz` does: the whole corpus, and some mutations of its well-formed files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import content_name, is_found, reach, targets
from tests.fuzz.mutations import mutated
from tests.fuzz.reach import few_that_reach
from tests.fuzz.targets import CORPUS, TARGETS, FaultError, opened

SLOW = {"sweep": 8, "record": 8, "config-yaml": 30}
"""Mutations of the targets that take tens of milliseconds each; the others get `MUTATIONS`."""
MUTATIONS = 60
MOST_FOUND = 1_500_000
"""Bytes of all files that fuzzing found."""
HARMLESS = {"config-yaml/date-as-key", "model-config/infinity"} | {
    f"card/{path.name}" for path in (CORPUS / "card").iterdir()
}
"""Odd, and read: dates are text, published configs hold infinities, and a card that is malformed is left out."""


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_and_mutations_of_it_raise_nothing_but_our_own_errors(name: str) -> None:
    random, good = Random(0), (CORPUS / name / "good").read_bytes()
    with opened(name) as target:
        assert target(good), "a schema has changed: python -m tests.fuzz.seeds"
        for path in sorted(path for path in (CORPUS / name).iterdir() if path.is_file()):
            target(path.read_bytes())
        for _ in range(SLOW.get(name, MUTATIONS)):
            target(mutated(good, random))


@pytest.mark.parametrize("name", TARGETS)
def test_what_once_went_wrong_is_refused(name: str) -> None:
    with opened(name) as target:
        for path in sorted(path for path in (CORPUS / name).iterdir() if path.is_file() and not is_found(path)):
            assert target(path.read_bytes()) == (path.name == "good" or f"{name}/{path.name}" in HARMLESS), path


def test_what_fuzzing_found_is_named_by_its_content_small_and_of_no_machine() -> None:
    found = [path for path in CORPUS.glob("*/*") if is_found(path)]
    assert {path.parent.name for path in found} == set(TARGETS)
    assert [path for path in found if path.name != content_name(path.read_bytes())] == []
    assert sum(path.stat().st_size for path in found) < MOST_FOUND
    assert [path for path in found if any(word in path.read_bytes() for word in (b"/dev/shm", b"site-packages"))] == []


def test_few_files_are_taken_that_reach_what_all_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    good = (CORPUS / "config-json" / "good").read_bytes()
    monkeypatch.setattr(reach, "seeds", lambda name: [good])
    word, unknown, both = b'{"bits": "x"}', b'{"nonsense": 1}', b'{"seed": 1, "limits": {"he": -1}}'
    taken = few_that_reach("config-json", [word, word + b" ", unknown, unknown + b" ", both])
    assert set(taken) == {word, unknown, both}
    assert few_that_reach("config-json", [good]) == []
    assert few_that_reach("config-json", [b'{"/dev/shm/fuzz-x": 1}', b'{"site-packages": 1}']) == []


def test_mutations_are_many_and_repeatable() -> None:
    good = (CORPUS / "plan" / "good").read_bytes()
    found = [mutated(good, Random(seed)) for seed in range(50)]
    assert found == [mutated(good, Random(seed)) for seed in range(50)]
    assert len(set(found)) > 40
    assert sum(_is_json(content) for content in found) > 25  # most get past the parser, to what reads the values


def test_a_mutated_header_is_still_framed() -> None:
    good = (CORPUS / "header" / "good").read_bytes()
    framed = [content for content in (mutated(good, Random(seed)) for seed in range(50)) if _is_framed(content)]
    assert len(framed) > 25


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _is_framed(content: bytes) -> bool:
    return 8 + int.from_bytes(content[:8], "little") <= len(content)


def _forget(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))["absent"]


def _spin(path: Path) -> None:
    sum(range(10**7))


def _hoard(path: Path) -> None:
    bytearray(64 << 20)


def test_another_error_and_too_much_time_or_memory_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(targets, "MOST_BYTES", 0)
    for name, read in (("forget", _forget), ("spin", _spin)):
        monkeypatch.setitem(TARGETS, name, ("a.json", read))
    with opened("forget") as target, pytest.raises(KeyError, match="absent"):
        target(b"{}")
    with opened("spin") as target, pytest.raises(FaultError, match=r"took .* s"):
        target(b"{}")
    monkeypatch.setattr(targets, "MOST_SECONDS", 60)
    monkeypatch.setattr(targets, "_peak", iter((0, 1 << 30)).__next__)
    monkeypatch.setitem(TARGETS, "hoard", ("a.json", _hoard))
    with opened("hoard") as target, pytest.raises(FaultError, match="took 1024 MiB"):
        target(b"{}")
