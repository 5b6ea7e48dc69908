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

KILLED = 137
"""Exit status of a process that ends at a point as by `kill -9`: no clean-up, nothing flushed."""
_TAKE_SPACE = frozenset({"create", "write", "mkdir", "fsync"})
_truncate = os.truncate
_NAMING = ("replace", "rename", "link", "symlink", "unlink", "rmdir", "mkdir")

Tear = Callable[[], object]
"""Does half of an operation."""
Act = Callable[["Points", Tear], None]
"""What happens at the point; returns where the operation is to be done after all."""


@dataclass(slots=True)
class Points:
    """The points of one run, in order."""

    root: Path
    at: int = 0
    """Number of the point at which something happens; 0 is none."""
    act: Act = lambda points, tear: None
    seen: list[str] = field(default_factory=list)
    """Kind and name of every point so far."""
    full: bool = False
    """Whether the disk has no room any more."""

    def reach(self, kind: str, path: object, tear: Tear = lambda: None) -> None:
        """Count a point, and let happen what is to happen there."""
        where = self._inside(path)
        if where is None:
            return
        self.seen.append(f"{kind} {where}")
        if len(self.seen) == self.at:
            self.act(self, tear)
        elif self.full and kind in _TAKE_SPACE:
            fail(errno.ENOSPC)

    def _inside(self, path: object) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}").removesuffix(" (deleted)")
        full = os.path.abspath(os.fspath(path))  # type: ignore[call-overload] # the calls that are counted take paths
        inside = f"{full}/".startswith(f"{self.root}/")
        return os.path.relpath(full, self.root) if inside else None


def fail(code: int) -> None:
    """Fail as a system call does."""
    raise OSError(code, os.strerror(code))


def io_error(points: Points, tear: Tear) -> None:
    """A failing disk: this operation fails half-done, later ones do not."""
    tear()
    fail(errno.EIO)


def full_disk(points: Points, tear: Tear) -> None:
    """No room from here on: everything that takes some fails."""
    points.full = True
    tear()
    fail(errno.ENOSPC)


def kill(points: Points, tear: Tear) -> None:
    """End here, half-done."""
    tear()
    os._exit(KILLED)


def send(number: signal.Signals) -> Act:
    """Return what sends this process a signal, as a user or a batch system does."""

    def act(points: Points, tear: Tear) -> None:
        os.kill(os.getpid(), number)

    return act


SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ACTIONS: dict[str, Act] = {"EIO": io_error, "ENOSPC": full_disk, "kill -9": kill}
ACTIONS |= {name: send(number) for name, number in SIGNALS.items()}


def applies(action: str, point: str) -> bool:
    """Return whether an action makes sense at a point: steps of the work meet signals alone, and take no space."""
    kind = point.split()[0]
    if kind == "step":
        return action in SIGNALS
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


def _open_like(points: Points) -> Callable[..., Any]:
    """Return an `open` whose files count every write that leaves the buffer."""
    plain = io.open

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            some = memoryview(data)[: len(data) // 2]
            points.reach("write", self.name, lambda: io.FileIO.write(self, some))
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
        if not set(mode) & set("wxa+") or points._inside(file) is None:
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
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
        inside = kwargs.get("dir_fd")
        path_ = path if inside is None else Path(os.readlink(f"/proc/self/fd/{inside}"), path)
        if name != "mkdir" or not os.path.isdir(path_):  # else nothing is made
            points.reach(name, path_)
        return plain(path, *args, **kwargs)

    return call


def _flushing(points: Points, plain: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(handle: Any) -> None:
        points.reach("fsync", handle if isinstance(handle, int) else handle.fileno())
        plain(handle)

    return call


def _sending(points: Points, plain: Callable[..., int]) -> Callable[..., int]:
    def call(out: int, source: int, offset: int, count: int) -> int:
        size = min(count, os.fstat(source).st_size - offset)
        points.reach("write", out, lambda: plain(out, source, offset, size // 2))
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
        def tear() -> None:
            plain(tensors, filename, *args, **kwargs)
            _truncate(filename, Path(filename).stat().st_size // 2)

        try:
            points.reach("write", filename, tear)
        except OSError as err:
            raise SafetensorError(f"Error while serializing: I/O error: {err.strerror} (os error {err.errno})") from err
        plain(tensors, filename, *args, **kwargs)

    return call
