"""Files and folders that belong to a process as long as it lives: what a killed one leaves, the next one removes.

The system frees a lock when its process ends, however it ends, so that nobody has to guess from names or times.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from quant_fairness_plugin.errors import ConfigError


def lock(handle: int) -> Literal["ours", "taken", "none"]:
    """Lock an open file or folder; `none` is a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "taken"
    except OSError as err:
        if err.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        return "none"
    return "ours"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder to work in, so that no other process works there at the same time.

    Raises:
        ConfigError: another process does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        if lock(handle) == "taken":
            raise ConfigError(
                f"{folder} is in use by another process; one at a time works there. Wait for it, or name another folder"
            )
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove files and folders of a name that begins so, and that no living process has locked."""
    for name in os.listdir(folder):
        if name.startswith(prefix):
            path = folder / name
            with suppress(FileNotFoundError, PermissionError):  # another process was quicker, or it is another user's
                if not path.is_symlink():
                    _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        if lock(handle) == "ours":
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)
    finally:
        os.close(handle)


class TemporaryFolder:
    """A folder for what need not outlive the process; removed by `close`, with the last reference, or by the next one.

    Hidden states and solved layers can be gigabytes, which a killed run must not leave on the disk for good.
    """

    def __init__(self, place: Path | None = None, prefix: str = "quant-fairness-tmp-") -> None:
        """Make the folder, and remove those of killed processes.

        Args:
            place: an existing folder; None is where the system has its temporary files.
            prefix: how its name begins.
        """
        place = place or Path(tempfile.gettempdir())
        remove_leftovers(place, prefix)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            with suppress(FileNotFoundError):  # a process that starts now as well took it for a leftover
                handle = os.open(self.path, os.O_RDONLY)
                if lock(handle) != "taken" and os.fstat(handle).st_nlink:
                    break
                os.close(handle)
        self.close = weakref.finalize(self, _remove, self.path, handle)


def _remove(path: Path, handle: int) -> None:
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:  # whoever wants to stop stops after this: nothing else would remove the rest
        shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        os.close(handle)


@contextmanager
def temporary_folder(place: Path | None = None, prefix: str = "quant-fairness-tmp-") -> Iterator[Path]:
    """Give a `TemporaryFolder` for as long as the context is open."""
    folder = TemporaryFolder(place, prefix)
    try:
        yield folder.path
    finally:
        folder.close()
