"""The loop: every command meets every fault at every point, and what is left must be right, also for the next run.

A process that has everything imported forks for each run. One run goes by untouched: what a kill leaves at a point is
copied, and for each of the other faults it forks there (`branches.py`). After a fault the command is run once more
without one, once for each state that faults leave (what lies in a half-written folder does not make another state:
nothing reads it), and has to end as if nothing had happened.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from unittest.mock import patch

from tests.faults.branches import Branches
from tests.faults.cases import Case
from tests.faults.points import KILL, Points, watched

KILLED = 137
STATUS = {KILL: {KILLED}, "SIGTERM": {0, 143}, "SIGINT": {0, 130}, "EIO": {0, 4}, "ENOSPC": {0, 4}}
"""Action → exit statuses; 0 where it came too late to matter, or hit what a result can do without."""
_RANDOM = re.compile(r"(\.partial-|\.old-|quant-fairness-tmp-|^tmp/)(?:[0-9]+-)?[0-9a-z_]{8}(?=/|$)")
_TIMED = ".run.json"
"""Ending of the files that say when a result was made."""
_NO_PAGE = "report.html was written"
"""What is said where a checkpoint was written without its page."""
Tree = dict[str, bytes]
Command = Sequence[str]


@dataclass(frozen=True, slots=True)
class Left:
    """What a run left."""

    status: int
    said: str
    tree: Tree
    points: tuple[str, ...] = ()
    """What it touched."""


@dataclass(slots=True)
class Trial:
    """A command with its start, and what an untouched run makes of it."""

    case: Case
    place: Path
    start: Tree
    expected: Left
    points: tuple[str, ...] = ()
    """What the command touches."""
    known: dict[bytes, list[str]] = field(default_factory=dict)
    """State that a fault left → what was wrong with the next run."""

    def meets(self, *, every: int = 1) -> list[tuple[int, str]]:
        """Meet every point with every fault that it can meet, of faults other than kills only every n-th; name them."""
        trunk, branches = self.place / "trunk", self.place / "branches"
        branches.mkdir()
        shutil.copytree(self.place / "start", trunk)
        ended = run(self.case.command, Points(trunk, copies=self.place / "copies", branches=Branches(branches, every)))
        assert (ended.status, ended.tree) == (0, self.expected.tree), f"its children have changed a run: {ended.said}"
        self.points = ended.points
        others = (path.name.removesuffix(".status").split("-") for path in branches.glob("*.status"))
        kills = [(number, KILL) for number, _ in enumerate(self.points, start=1)]
        return kills + sorted((int(number), action) for action, number in others)

    def meet(self, number: int, action: str) -> list[str]:
        """Return what is wrong after a fault at a point; nothing where all is well."""
        if action == KILL:
            root = self.place / "copies" / str(number)
            left = Left(KILLED, "", read(root))
        else:
            root = self.place / "branches" / f"{action}-{number}"
            said, status = (root.with_name(f"{root.name}.{end}").read_text("utf-8") for end in ("said", "status"))
            left = Left(int(status), said, read(root))
        problems = list(self._wrong(left, action, self.points[number - 1]))
        state = digest(left.tree)
        if state not in self.known:
            self.known[state] = list(self._wrong_next(left, root))
        shutil.rmtree(root)
        return problems + self.known[state]

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
        units = {name: (name,) for name in left.tree if belongs(name, self.case.outputs) and ".partial-*" not in name}
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
            if not belongs(name, allowed) or ".partial-*" in name:
                yield f"{name} is left behind"

    def _wrong_next(self, left: Left, root: Path) -> Iterator[str]:
        after = run(self.case.command, Points(root))
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
    """Make what a command starts from, and run it once untouched."""
    own, whole = place / "start", place / "whole"
    shutil.copytree(start, own)
    for command in case.prepare:
        made = run(command, Points(own))
        assert made.status == 0, made.said
    if case.changed is not None:
        case.changed(own)
    shutil.copytree(own, whole)
    expected = run(case.command, Points(whole))
    assert expected.status == 0, expected.said
    return Trial(case, place, read(own), expected)


def run(command: Command, points: Points) -> Left:
    """Run a command in a process of its own, in a folder; what it says goes to a file beside that."""
    root = points.root
    said, seen = root.with_name(f"{root.name}.said"), root.with_name(f"{root.name}.points")
    child = fork(partial(_be, command, points, said, seen))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = Left(status, said.read_text("utf-8"), read(root), tuple(seen.read_text("utf-8").splitlines()))
    said.unlink()
    seen.unlink()
    return left


def fork(become: Callable[[], None]) -> int:
    """Fork this process, and return the number of the new one, which never returns from `become`.

    A thread that has computed nothing does it: torch's threads belong to the one that computes with them, and a fork,
    which has none of them, would wait for them without end.
    """
    children = list[int]()

    def split() -> None:
        child = os.fork()
        if child == 0:
            become()
        children.append(child)

    thread = Thread(target=split)
    thread.start()
    thread.join()
    return children[0]


def _be(command: Command, points: Points, said: Path, seen: Path) -> None:
    """Be the command; never returns."""
    import typer

    from quant_fairness_plugin.cli.main import app, run_guarded

    status = 70  # as where this function itself fails
    try:
        gc.freeze()  # else looking through everything that is imported takes longer than most commands do
        weakref.finalize._registry.clear()  # temporary folders of the process that this one is a fork of are not ours
        os.chdir(points.root)
        tempfile.tempdir = str(points.root / "tmp")
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        with watched(points):
            status = run_guarded(typer.main.get_command(app), list(command), "quant-fairness")
        gc.collect()
        weakref.finalize._exitfunc()  # as where a process ends by itself
        sys.stderr.flush()
    finally:
        seen.write_text("\n".join(points.seen), encoding="utf-8")
        os._exit(status)


class AtOnce:
    """An executor that does at once what it is given, in the thread that gives it."""

    def __init__(self, max_workers: int) -> None:
        """Take what a pool of threads takes."""

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def submit(self, work: Callable[..., object], *given: object) -> Future[object]:
        """Return the result of the work, or its error."""
        done: Future[object] = Future()
        try:
            done.set_result(work(*given))
        except Exception as err:  # noqa: BLE001 - whoever asks for the result gets it
            done.set_exception(err)
        return done


def without_slow_readers() -> ExitStack:
    """Replace what only reads and computes for long: the page's drawings, and the two readers of `verify`.

    And the threads that repeat the last line of long steps and read the next block, as a process with threads must not
    fork: a child would wait for what the thread of its parent reads.
    """
    stack = ExitStack()
    stubs: dict[str, Callable[..., object]] = {
        "report.page.render_report": lambda sources, gate=None: "<title>page</title>\n" * 400,
        "checkpoint.served.compare_served": lambda folder, rows: "not compared",
        "checkpoint.readers.compare.compare_with_transformers": lambda folder: 0.0,
        "cli.progress._beat": lambda lines, ended: None,
        "model.block_feed.ThreadPoolExecutor": AtOnce,
    }
    for name, stub in stubs.items():
        stack.enter_context(patch(f"quant_fairness_plugin.{name}", stub))
    return stack


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
        name = _RANDOM.sub(lambda match: f"{match[1]}*", str(path.relative_to(root)))
        if path.is_file():
            tree[name] = b"" if name.endswith(_TIMED) else path.read_bytes()
        elif name != "tmp" and not any(path.iterdir()):
            tree[f"{name}/"] = b""
    return tree


def digest(tree: Tree) -> bytes:
    """Return a checksum of a tree, in which a folder that is half-written is a name alone."""
    total = hashlib.sha256()
    for name, content in sorted(tree.items()):
        unread = re.match(r".*?(?:\.partial|tmp/quant-fairness-tmp)-\*/", name)
        known = (unread[0], b"") if unread else (name, content)
        total.update(b"".join(hashlib.sha256(part).digest() for part in (known[0].encode(), known[1])))
    return total.digest()
