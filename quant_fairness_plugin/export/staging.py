"""Atomic folders: a checkpoint is built beside its final name and gets that name only when it is complete.

The working folder is `OUT.partial-<process>-<id>`, locked while its process lives; an old `OUT` that is replaced is
`OUT.old-<id>` between two renames. Whatever a killed run left behind is put right at the start of the next one. POSIX
only.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_fairness_plugin.artifacts import check_place, lock
from quant_fairness_plugin.errors import ConfigError, ResourceError, is_disk_error

MARKER = "quant_fairness.json"
"""The file that makes a folder one of ours, so that `overwrite` never removes anything else."""
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
    with _disk_errors(out):
        _remove_partial(out)
        _recover(out)
        check_output(out, overwrite=overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _new_folder(out) as folder:
            yield folder
            flush_folder(folder)
            _publish(folder, out)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder beside one that is being changed, and on its disk; it is removed on leaving.

    Raises:
        ConfigError: another process has such a folder of the same one.
        ResourceError: no space, no permission, or a failing disk.
    """
    folder = folder.resolve()
    with _disk_errors(folder):
        _remove_partial(folder)
        with _new_folder(folder) as scratch:
            yield scratch
            shutil.rmtree(scratch)


def check_output(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be created or replaced, without changing anything.

    Raises:
        ConfigError: `out` exists (without `overwrite`), or it is not an earlier export; or no folder can be there.
        ResourceError: where it is to be takes no new folder.
    """
    check_place(out)
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


def check_file(out: Path, *, suffix: str, overwrite: bool) -> None:
    """Check that a file `out` may be created or replaced, without changing anything.

    Raises:
        ConfigError: another suffix, or `out` exists (without `overwrite`) or is no file; or no file can be there.
        ResourceError: where it is to be takes no new file.
    """
    check_place(out)
    if out.suffix != suffix:
        raise ConfigError(f"{out} does not end in {suffix}, and the output is such a file; give such a name with -o")
    if os.path.lexists(out) and not (overwrite and out.is_file()):
        raise ConfigError(f"{out} exists already; the output must be a new name. Choose another, or pass --overwrite.")


def flush_folder(folder: Path) -> None:
    """Force every file below `folder`, and the folders themselves, to disk."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
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
        flush(out.parent)
    except BaseException:
        if not replaces or old.exists():  # else the first rename did not happen, and `out` is still the old folder
            shutil.rmtree(out, ignore_errors=True)
        if old.exists():
            os.rename(old, out)
        raise
    if not replaces:
        return
    try:
        shutil.rmtree(old)
    except OSError as err:
        _logger.warning("%s: the replaced folder could not be removed (%s); remove it by hand", old, err)
    except BaseException:  # the new one is in place: whoever wants to stop stops after this
        shutil.rmtree(old, ignore_errors=True)
        raise


def _remove_partial(out: Path) -> None:
    """Remove what killed runs had half-written.

    Raises:
        ConfigError: a live process is writing it; its `.old-` folder must not be touched either.
    """
    for partial in _beside(out, "partial"):
        with _locked(partial) as held:
            if held:
                shutil.rmtree(partial)


def _recover(out: Path) -> None:
    """Give a folder that a killed run had moved aside its name back, or remove it where the new one is in place."""
    for old in _beside(out, "old"):
        if out.exists():
            shutil.rmtree(old)
        else:
            _logger.warning("%s: put back, after a run that was killed while replacing it", out)
            os.rename(old, out)


def _beside(out: Path, kind: str) -> list[Path]:
    names = re.compile(rf"{re.escape(out.name)}\.{kind}-(?:[0-9]+-)?[0-9a-f]{{8}}")
    return sorted(path for path in out.parent.iterdir() if names.fullmatch(path.name)) if out.parent.is_dir() else []


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Give an empty, locked folder beside `out`, which is removed if anything fails."""
    folder = out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        with _locked(folder):
            yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold an advisory lock on a folder; False on a file system that has none, where nobody knows whose it is."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as err:  # removed between its making and its locking, by a process that starts now as well
        raise ConfigError(_taken(folder)) from err
    try:
        held = lock(handle)
        if held == "taken" or not os.fstat(handle).st_nlink:
            raise ConfigError(_taken(folder))
        yield held == "ours"
    finally:
        os.close(handle)


def _taken(folder: Path) -> str:
    writer = folder.name.rpartition(".partial-")[2].partition("-")[0]
    return (
        f"{folder} is being written by another process ({writer}); one run at a time may write an output. Wait for it, "
        "or choose another name."
    )


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if not is_disk_error(err):
            raise
        raise ResourceError(
            f"{out}: cannot be written ({err.strerror or err}); the folder needs write access and space on a working "
            "disk. Free space or choose another --out."
        ) from err
