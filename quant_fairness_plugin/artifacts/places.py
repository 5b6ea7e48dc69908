"""Whether a name can be written, asked before the work whose result it is to hold. Nothing is changed by asking."""

from __future__ import annotations

import os
from pathlib import Path

from quant_fairness_plugin.errors import ConfigError, ResourceError

BESIDE = 40
"""Letters that are added to a name while it is written beside its final place."""


def check_place(out: Path) -> None:
    """Refuse a name that no file or folder can be made under; missing parents are made later.

    Raises:
        ConfigError: something on the way is no folder, or the name is empty.
        ResourceError: the folder that is there may not be written, or the name is too long.
    """
    if not out.name:
        raise ConfigError(f"{out} names no file or folder to write; give a name, such as {out / 'result'}")
    above = _nearest(out)
    if not above.is_dir():
        raise ConfigError(f"{out} cannot be written: {above} is no folder. Give a name in a folder, or in a new one")
    longest = os.pathconf(above, "PC_NAME_MAX") - BESIDE
    if long := next((part for part in out.parts if len(os.fsencode(part)) > longest), None):
        raise ResourceError(
            f"{long[:20]}… cannot be written: the name has {len(os.fsencode(long))} bytes, and up to {longest} can be "
            "written here. Choose another name"
        )
    if not os.access(above, os.W_OK | os.X_OK) or _is_virtual(above):
        raise ResourceError(f"{out} cannot be written: {above} takes no new files. Choose another place")


def check_file_place(out: Path) -> None:
    """Refuse a name that no file can be written under: as `check_place`, and where a folder is.

    Raises:
        ConfigError, ResourceError: as `check_place`.
    """
    check_place(out if out.name else out.resolve())
    if out.is_dir():
        raise ConfigError(
            f"{out} is a folder, and a file is to be written; give a name in it, such as {out / 'x.json'}"
        )


def _nearest(out: Path) -> Path:
    """Return the first parent that is there."""
    for folder in Path(os.path.abspath(out)).parents:
        try:
            folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as err:  # a name that is too long for the system
            raise ResourceError(f"{str(out)[:60]}… cannot be written ({err.strerror}). Choose another name") from err
        return folder
    raise AssertionError("the root is always there")


def _is_virtual(folder: Path) -> bool:
    """Return whether a folder is the kernel's own, which takes files from nobody, root included."""
    return Path(os.path.realpath(folder)).parts[1:2] in (("proc",), ("sys",))
