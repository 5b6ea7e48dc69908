"""The loop: every command meets every fault at every point, and what is left must be right, also for the next run.

A process that has everything imported forks for each run, so that a run costs about a second. After a fault the command
is run once more without one (once for each state that faults leave), and has to end as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cases import Case
from tests.faults.points import ACTIONS, KILLED, Points, applies, watched

STATUS = {"kill -9": {KILLED}, "SIGTERM": {0, 143}, "SIGINT": {0, 130}, "EIO": {0, 4}, "ENOSPC": {0, 4}}
"""Action → exit statuses; 0 where it came too late to matter, or hit what a result can do without."""
_RANDOM = re.compile(r"(\.partial-|\.old-|quant-fairness-|^tmp/)[0-9a-z_]{8}(?=/|$)|\.[0-9a-z_]{8}$")
_TIMED = ".run.json"
"""Ending of the files that say when a result was made."""
_NO_PAGE = "report.html was written"
"""What is said where a checkpoint was written without its page."""
Tree = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Left:
    """What a run left."""

    status: int
    said: str
    tree: Tree
    points: list[str]
    """What it touched; empty where it was killed."""


@dataclass(slots=True)
class Trial:
    """A command with its start, and what an untouched run makes of it."""

    case: Case
    place: Path
    start: Tree
    expected: Left
    known: dict[bytes, list[str]] = field(default_factory=dict)
    """State that a fault left → what was wrong with the next run."""

    def meets(self) -> list[tuple[int, str]]:
        """Return every point with every fault that it can meet."""
        points = list(enumerate(self.expected.points, start=1))
        return [(number, action) for action in ACTIONS for number, point in points if applies(action, point)]

    def meet(self, number: int, action: str) -> list[str]:
        """Return what is wrong after a fault at a point; nothing where all is well."""
        root = self.place / f"{action}-{number}".replace(" ", "")
        shutil.copytree(self.place / "start", root)
        try:
            left = run(self.case.command, root, Points(root, number, ACTIONS[action]))
            problems = list(self._wrong(left, action, self.expected.points[number - 1]))
            state = digest(left.tree)
            if state not in self.known:
                self.known[state] = list(self._wrong_next(left, root))
            return problems + self.known[state]
        finally:
            shutil.rmtree(root)

    def _wrong(self, left: Left, action: str, point: str) -> Iterator[str]:
        if left.status not in STATUS[action]:
            yield f"exit status {left.status}: {last_line(left.said)}"
        if left.status != KILLED:
            yield from wrong_message(left)
            if not (action == "EIO" and point.split()[0] in ("unlink", "rmdir")):  # which leaves what it cannot remove
                yield from self._strays(left.tree)
        if left.status == 0 and not self._complete(left):
            yield "success without a complete output"
        yield from self._torn(left)

    def _torn(self, left: Left) -> Iterator[str]:
        """Find outputs that are neither as before nor as after."""
        units = {name: (name,) for name in left.tree if belongs(name, self.case.outputs)}
        if not self.case.pieces:
            units = {output: tuple(name for name in units if belongs(name, (output,))) for output in self.case.outputs}
        for unit, names in units.items():
            now = {name: left.tree[name] for name in names}
            before, after = (part(tree, (unit,)) for tree in (self.start, self.expected.tree))
            if now not in (before, after) and now and not self._without_page(left):
                yield f"{unit} is neither as before nor complete: {', '.join(names)}"
            if not now and before and not self._moved(left, unit):
                yield f"{unit} is gone"

    def _moved(self, left: Left, unit: str) -> bool:
        """Return whether a killed run has left what it replaces under another name, for the next one to put back."""
        before = part(self.start, (unit,))
        moved = {name.replace(f"{unit}.old-*", unit, 1): content for name, content in left.tree.items()}
        return left.status == KILLED and part(moved, (unit,)) == before

    def _complete(self, left: Left) -> bool:
        """Return whether all outputs are those of an untouched run."""
        ours, whole = (part(tree, self.case.outputs) for tree in (left.tree, self.expected.tree))
        missing = {name for name in whole.keys() - ours.keys() if f"no {name} was written" in left.said}
        return ours == {name: content for name, content in whole.items() if name not in missing} or (
            self._without_page(left)
        )

    def _without_page(self, left: Left) -> bool:
        """Return whether the output is a checkpoint without its page, and this was said."""
        return left.status == 0 and _NO_PAGE in left.said and f"{self.case.outputs[0]}/report.html" not in left.tree

    def _strays(self, tree: Tree) -> Iterator[str]:
        allowed = (*self.case.outputs, "work")
        for name in tree.keys() - self.start.keys():
            if not belongs(name, allowed) or _RANDOM.search(name.removesuffix(".json")):
                yield f"{name} is left behind"

    def _wrong_next(self, left: Left, root: Path) -> Iterator[str]:
        after = run(self.case.command, root, Points(root))
        if after.status == 2 and "exists already" in after.said and self._complete(left):
            return
        if after.status:
            yield f"the next run ends with {after.status}: {last_line(after.said)}"
        ours, whole = after.tree, self.expected.tree
        for name in sorted(ours.keys() | whole.keys()):
            if ours.get(name) != whole.get(name):
                how = "differs" if name in ours and name in whole else "is missing" if name in whole else "is left over"
                yield f"after the next run {name} {how}"


def open_trial(case: Case, start: Path, place: Path) -> Trial:
    """Make what a command starts from, and run it once untouched, counting its points."""
    own = place / "start"
    shutil.copytree(start, own)
    for command in case.prepare:
        made = run(command, own, Points(own))
        assert made.status == 0, made.said
    if case.changed is not None:
        case.changed(own)
    shutil.copytree(own, place / "whole")
    whole = run(case.command, place / "whole", Points(place / "whole"))
    assert whole.status == 0, whole.said
    return Trial(case, place, read(own), whole)


def run(command: Sequence[str], root: Path, points: Points) -> Left:
    """Run a command in a process of its own, in a folder; what it says goes to files beside it."""
    said, seen = root.with_name(f"{root.name}.said"), root.with_name(f"{root.name}.points")
    child = os.fork()
    if child == 0:
        _be(command, root, points, said, seen)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reached = seen.read_text(encoding="utf-8").splitlines() if seen.exists() else []
    left = Left(status, said.read_text(encoding="utf-8"), read(root), reached)
    said.unlink()
    seen.unlink(missing_ok=True)
    return left


def _be(command: Sequence[str], root: Path, points: Points, said: Path, seen: Path) -> None:
    """Be the command; never returns."""
    import typer

    from quant_fairness_plugin.cli.main import app, run_guarded

    status = 70  # as where this function itself fails
    try:
        os.chdir(root)
        tempfile.tempdir = str(root / "tmp")
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with watched(points):
            status = run_guarded(typer.main.get_command(app), list(command), "quant-fairness")
        seen.write_text("\n".join(points.seen), encoding="utf-8")
        sys.stderr.flush()
    finally:
        os._exit(status)


def wrong_message(left: Left) -> Iterator[str]:
    """Find a traceback, or other than one line of an error where there was one."""
    errors = [line for line in left.said.splitlines() if line.startswith("error: ")]
    if len(errors) != bool(left.status) or (left.status and last_line(left.said) != errors[-1]):
        yield f"{len(errors)} lines of an error, and exit status {left.status}"
    if "Traceback" in left.said or any(line.startswith("error: unexpected") for line in errors):
        yield f"an error that nobody has thought of: {last_line(left.said)}"


def last_line(text: str) -> str:
    """Return the last line of a text."""
    return (text.strip().splitlines() or [""])[-1]


def belongs(name: str, roots: Sequence[str]) -> bool:
    """Return whether a file is one of these, or lies in one of them."""
    return any(f"{name}/".startswith(f"{root}/") for root in roots)


def part(tree: Tree, roots: Sequence[str]) -> Tree:
    """Return the files of a tree that are, or lie in, one of these."""
    return {name: content for name, content in tree.items() if belongs(name, roots)}


def read(root: Path) -> Tree:
    """Return every file of a folder with its content, and every empty folder; without what differs from run to run."""
    tree: Tree = {}
    for path in sorted(root.rglob("*")):
        name = _RANDOM.sub(lambda match: f"{match[1] or '.'}*", str(path.relative_to(root)))
        if path.is_file():
            tree[name] = b"" if name.endswith(_TIMED) else path.read_bytes()
        elif name != "tmp" and not any(path.iterdir()):
            tree[f"{name}/"] = b""
    return tree


def digest(tree: Tree) -> bytes:
    """Return a checksum of a tree."""
    total = hashlib.sha256()
    for name, content in sorted(tree.items()):
        total.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return total.digest()
