"""Which files of many are enough: the fewest that take the parser of a target through every step that all of them do.

A step is one line after another in one function of the library. libFuzzer counts how often as well, and keeps a file
for each; for a corpus that `make test` reads, that are too many.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import quant_fairness_plugin
from tests.fuzz.targets import Target, opened, seeds

Step = tuple[str, int, int]
"""File, the line before (0 at the beginning of a function) and the line."""
MOST_FILES = 40
"""Taken for a target: those that reach most."""
_LIBRARY = str(Path(quant_fairness_plugin.__file__).parent)


def few_that_reach(name: str, contents: Iterable[bytes]) -> list[bytes]:
    """Return the fewest of the files that reach what they all reach and the corpus does not.

    The one that reaches most that is new is taken first; of those that reach as much, the first.

    Args:
        name: a target.
        contents: files that it reads without a fault, the ones that are rather taken first.
    """
    with opened(name) as target:
        reached = set().union(*(steps_of(target, content) for content in seeds(name)))
        left = {content: steps_of(target, content) for content in contents if _says_nothing_of(target, content)}
    taken: list[bytes] = []
    while left and len(taken) < MOST_FILES:
        best = max(left, key=lambda content: len(left[content] - reached))
        if not left[best] - reached:
            break
        taken.append(best)
        reached |= left.pop(best)
    return taken


def steps_of(target: Target, content: bytes) -> set[Step]:
    """Return the steps through the library that are taken to read a file."""
    found: set[Step] = set()

    def enter(frame: FrameType, event: str, value: Any) -> Any:
        file, before = frame.f_code.co_filename, 0
        if not file.startswith(_LIBRARY):
            return None

        def step(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal before
            if event == "line":
                found.add((file, before, frame.f_lineno))
                before = frame.f_lineno
            return step

        return step

    outer = sys.gettrace()
    sys.settrace(enter)
    try:
        with suppress(Exception):  # a refusal, mostly; what a fault is, the target says
            target.read(content)
    finally:
        sys.settrace(outer)
    return found


def _says_nothing_of(target: Target, content: bytes) -> bool:
    """Return whether a file does not name the place where it was found; libFuzzer tries what it was compared with."""
    return target.path.parent.parent.as_posix().encode() not in content and b"site-packages" not in content
