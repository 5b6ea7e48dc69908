"""Atomic folders: a checkpoint is built beside its final name and gets that name only when it is complete.

The working folder is `OUT.partial-<id>`, locked while its process lives; an old `OUT` that is replaced is
`OUT.old-<id>` between two renames. Whatever a killed run left behind is put right at the start of the next one. POSIX
only.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_fairness_plugin.errors import ConfigError, ResourceError

MARKER = "quant_fairness.json"
"""The file that makes a folder one of ours, so that `overwrite` never removes anything else."""
_NOT_WRITABLE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ENAMETOOLONG,
    }
)
_logger = logging.getLogger(__name__)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder to fill; on leaving it is flushed to disk and renamed to `out`, or removed if anything failed.

    An `out` that is a symbolic link stays one: its target is replaced.

    Args:
        out: the final name.
        overwrite: allow `out` to be an earlier export. It is removed last, after the new one is in place.

    Raises:
        ConfigError: `out` exists (without `overwrite`), is not an earlier export, or another process is writing it.
        ResourceError: no space, no permission, or a failing disk.
    """
    out = out.resolve()
    try:
        _recover(out)
        check_output(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            with _lock(folder):
                yield folder
                flush_folder(folder)
                _publish(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as err:
        if err.errno not in _NOT_WRITABLE:
            raise
        raise ResourceError(
            f"{out}: cannot be written ({err.strerror or err}); the folder needs write access and space on a working "
            "disk. Free space or choose another --out."
        ) from err


def check_output(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be created or replaced, without changing anything.

    Raises:
        ConfigError: `out` exists (without `overwrite`), or it is not an earlier export.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists already; the output must be a new name. Choose another, or pass --overwrite.")
    replaceable = out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))
    if not replaceable:
        raise ConfigError(
            f"{out} is not a checkpoint that this program wrote (it has no {MARKER}); --overwrite replaces only those. "
            "Choose another name, or remove it yourself."
        )


def flush_folder(folder: Path) -> None:
    """Force every file below `folder`, and the folders themselves, to disk."""
    for path in sorted(folder.rglob("*")):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(folder: Path, out: Path) -> None:
    """Rename the complete folder to `out`; a previous one is moved aside first, put back on failure, removed last."""
    old = out.with_name(f"{out.name}.old-{secrets.token_hex(4)}")
    replaces = out.exists()
    try:
        if replaces:
            os.replace(out, old)
        os.replace(folder, out)
        _flush(out.parent)
    except BaseException:
        if not replaces or old.exists():  # else the first rename did not happen, and `out` is still the old folder
            shutil.rmtree(out, ignore_errors=True)
        if old.exists():
            os.rename(old, out)
        raise
    try:
        if replaces:
            shutil.rmtree(old)
    except OSError as err:
        _logger.warning("%s: the replaced folder could not be removed (%s); remove it by hand", old, err)


def _recover(out: Path) -> None:
    """Undo what killed runs left: give a folder that was moved aside its name back, remove what is half-written."""
    if not out.parent.is_dir():
        return
    for partial in sorted(out.parent.glob(f"{_escaped(out.name)}.partial-*")):
        with _lock(partial):  # a live writer keeps it, and then its `.old-` folder must not be touched either
            shutil.rmtree(partial)
    for old in sorted(out.parent.glob(f"{_escaped(out.name)}.old-*")):
        if out.exists():
            shutil.rmtree(old)
        else:
            _logger.warning("%s: put back, after a run that was killed while replacing it", out)
            os.rename(old, out)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder; the system drops it when the process ends, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as err:
        raise ConfigError(
            f"{folder} is being written by another process; one run at a time may write an output. Wait for it, or "
            "choose another name."
        ) from err
    finally:
        os.close(handle)
