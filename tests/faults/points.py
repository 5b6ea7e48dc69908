"""Every place where a process touches the disk, counted, and a fault at the n-th of them.

Counted are the calls that create, write, flush, rename, link or remove something below a folder, whoever makes them:
Python's own `open` in any of its forms (a write is counted where it leaves the buffer, so that a fault tears the file
there), `os`, and safetensors' writer. Reads are not counted, and neither is what lies outside of the folder.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
from safetensors import SafetensorError

from quant_fairness_plugin.cli.progress import Lines

_TAKE_SPACE = frozenset({"create", "write", "mkdir", "fsync"})
_NAMING = ("replace", "rename", "link", "symlink", "unlink", "rmdir", "mkdir")
_open, _pread, _truncate = io.open, os.pread, os.truncate

Tear = Callable[[Path], object]
"""Does half of an operation on the file that it is given, which is the real one or a copy of it."""


def _nothing(path: Path) -> None:
    """Do half of what cannot be done by half."""


@dataclass(slots=True)
class Points:
    """The points of one run, in order."""

    root: Path
    at: int = 0
    """Number of the point at which something happens; 0 is none."""
    act: Callable[[], None] = lambda: None
    """What happens there; the operation is done after it where it returns."""
    copies: Path | None = None
    """Where to keep a copy of the folder at every point, as a kill there would leave it."""
    branches: Callable[[Points], None] | None = None
    """What is done at every point first; see `branches.py`."""
    seen: list[str] = field(default_factory=list)
    """Kind and name of every point so far."""
    _full: bool = False
    _busy: bool = False

    def reach(self, kind: str, path: object, tear: Tear = _nothing) -> None:
        """Count a point, and let happen what is to happen there."""
        where = None if self._busy else self.inside(path)
        if where is None:
            return
        self.seen.append(f"{kind} {where}")
        if self.copies is not None:
            self._busy = True
            copy = self.copies / str(len(self.seen))
            shutil.copytree(self.root, copy, symlinks=True)
            tear(copy / where)
            self._busy = False
        if self.branches is not None:
            self._busy = True
            self.branches(self)
            self._busy = False
        if len(self.seen) == self.at:
            tear(self.root / where) if kind != "step" and self.act not in SIGNALLING else None
            self._full = self.act is full_disk
            self.act()
        elif self._full and kind in _TAKE_SPACE:
            full_disk()

    def inside(self, path: object) -> str | None:
        """Return the name of a file, a path or a descriptor, in the folder; None outside."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        full = os.path.abspath(os.fspath(path))  # type: ignore[call-overload] # the calls that are counted take paths
        return os.path.relpath(full, self.root) if f"{full}/".startswith(f"{self.root}/") else None


def io_error() -> None:
    """A failing disk: this operation fails half-done, later ones do not."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def full_disk() -> None:
    """No room from here on: everything that takes some fails."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def terminate() -> None:
    """`kill`, or a batch system."""
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


KILL = "kill -9"
"""Is no action: what it leaves is copied while an untouched run goes on."""
SIGNALLING = (terminate, interrupt)
ACTIONS: dict[str, Callable[[], None]] = {
    "EIO": io_error,
    "ENOSPC": full_disk,
    "SIGTERM": terminate,
    "SIGINT": interrupt,
}


def applies(action: str, point: str) -> bool:
    """Return whether an action makes sense at a point: steps of the work meet signals alone, and take no space."""
    kind = point.split()[0]
    if kind == "step":
        return action in ("SIGTERM", "SIGINT")
    return action != "ENOSPC" or kind in _TAKE_SPACE


@contextmanager
def watched(points: Points) -> Iterator[None]:
    """Count the points of this process while the context is open."""
    with ExitStack() as stack:
        for owner, name, replacement in _replacements(points):
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _replacements(points: Points) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    opened = _open_like(points)
    yield Lines, "show", _stepping(points, Lines.show)
    yield builtins, "open", opened
    yield io, "open", opened
    for name in _NAMING:
        yield os, name, _named(points, name, getattr(os, name))
    yield os, "fsync", _flushing(points, os.fsync)
    yield os, "sendfile", _sending(points, os.sendfile)
    yield os, "open", _creating(points, os.open)
    yield safetensors.torch, "serialize_file", _saving(points, safetensors.torch.serialize_file)


def _put(path: Path, offset: int, content: bytes | memoryview) -> None:
    with _open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def _open_like(points: Points) -> Callable[..., Any]:
    """Return an `open` whose files count every write that leaves the buffer."""

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            half = memoryview(data)[: len(data) // 2]
            points.reach("write", self.fileno(), lambda path: _put(path, self.tell(), half))
            return io.FileIO.write(self, data)

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wxa+") or points.inside(file) is None:
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            points.reach("create", file)
        raw = Counted(file, mode.replace("t", "").replace("b", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline)

    return opened


def _stepping(points: Points, plain: Callable[..., None]) -> Callable[..., None]:
    """Count what a command says of its progress: between two of these it computes."""

    def call(lines: Lines, step: str, done: int, total: int) -> None:
        points.reach("step", points.root / f"{step} {done}")
        plain(lines, step, done, total)

    return call


def _named(points: Points, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("dir_fd")
        full = path if folder is None else Path(os.readlink(f"/proc/self/fd/{folder}"), path)
        if name != "mkdir" or not os.path.isdir(full):  # else nothing is made
            points.reach(name, full)
        return plain(path, *args, **kwargs)

    return call


def _flushing(points: Points, plain: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(handle: Any) -> None:
        points.reach("fsync", handle if isinstance(handle, int) else handle.fileno())
        plain(handle)

    return call


def _sending(points: Points, plain: Callable[..., int]) -> Callable[..., int]:
    def call(out: int, source: int, offset: int, count: int) -> int:
        half = _pread(source, (os.fstat(source).st_size - offset) // 2, offset)
        points.reach("write", out, lambda path: _put(path, os.lseek(out, 0, os.SEEK_CUR), half))
        return plain(out, source, offset, count)

    return call


def _creating(points: Points, plain: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            points.reach("create", path)
        return plain(path, flags, *args, **kwargs)

    return call


def _saving(points: Points, plain: Callable[..., None]) -> Callable[..., None]:
    """Count safetensors' writer, which writes beside and renames, or, as older ones do, at once to the name."""

    def call(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        def tear(path: Path) -> None:
            plain(tensors, path, *args, **kwargs)
            _truncate(path, path.stat().st_size // 2)

        try:
            points.reach("write", filename, tear)
        except OSError as err:
            raise SafetensorError(f"Error while serializing: I/O error: {err.strerror} (os error {err.errno})") from err
        plain(tensors, filename, *args, **kwargs)

    return call
