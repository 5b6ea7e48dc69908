"""A run that forks where it touches the disk: each child meets a fault there, and the run itself goes on untouched.

So that what comes before a fault is computed once for all of them. A child gets a copy of the folder under the folder's
name, and everything that it has open is opened again there; the run's own folder waits beside it until the child ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.faults.points import ACTIONS, Points, applies

_ONCE = os.O_CREAT | os.O_TRUNC | os.O_EXCL


@dataclass(slots=True)
class Branches:
    """What every point does with a run that it belongs to."""

    place: Path
    """Where each child leaves a folder `ACTION-POINT`, what it said beside it, and its exit status."""
    every: int = 1
    """Of all faults, so many are one that is met."""
    _faults: int = 0

    def __call__(self, points: Points) -> None:
        """Meet the faults of the point that was reached last, each in a child, which returns from here to meet it."""
        for action in ACTIONS:
            if not applies(action, points.seen[-1]):
                continue
            self._faults += 1
            if (self._faults - 1) % self.every == 0 and self._fork(points, action):
                return

    def _fork(self, points: Points, action: str) -> bool:
        """Return whether this is the child; the run itself returns when that has ended."""
        root, number = points.root, len(points.seen)
        aside, left = root.with_name(f"{root.name}.aside"), self.place / f"{action}-{number}"
        os.rename(root, aside)
        shutil.copytree(aside, root, symlinks=True)
        child = os.fork()
        if child == 0:
            _speak_to(left.with_name(f"{left.name}.said"))
            _move_open_files(aside, root)
            points.branches = points.copies = None
            points.at, points.act = number, ACTIONS[action]
            return True
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left.with_name(f"{left.name}.status").write_text(str(status), encoding="utf-8")
        os.rename(root, left)
        os.rename(aside, root)
        return False


def _speak_to(said: Path) -> None:
    """Let this process say what it says into a file of its own, which begins with what was said so far."""
    shutil.copyfile(os.readlink("/proc/self/fd/2"), said)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)


def _move_open_files(old: Path, new: Path) -> None:
    """Open again, in the copy of a folder, what this process has open in the folder; locks are held there, too."""
    os.chdir(new)
    for name in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
        if not f"{path}/".startswith(f"{old}/"):
            continue
        assert not path.endswith(" (deleted)"), f"{path} cannot be copied"
        state = Path(f"/proc/self/fdinfo/{name}").read_text("ascii")
        position, flags = (int(re.findall(rf"^{key}:\s+(\w+)", state, re.M)[0], base) for key, base in _STATE)
        handle = os.open(new / os.path.relpath(path, old), flags & ~_ONCE)
        if position:
            os.lseek(handle, position, os.SEEK_SET)
        os.dup2(handle, int(name), inheritable=False)
        os.close(handle)
        if re.search(r"^lock:.*FLOCK", state, re.M):
            fcntl.flock(int(name), fcntl.LOCK_EX | fcntl.LOCK_NB)


_STATE = (("pos", 10), ("flags", 8))
