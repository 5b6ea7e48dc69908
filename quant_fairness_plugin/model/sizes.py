"""Sizes in bytes, as people write and read them. No torch."""

from __future__ import annotations

import re

from quant_fairness_plugin.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `1GB`, `1.5 GiB`, `800MB` or `123456`.

    Raises:
        ConfigError: not a size, or none of at least one byte.

    >>> parse_size("1.5 GiB")
    1610612736
    """
    match = _SIZE.fullmatch(text.strip())
    names = {unit.upper(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].upper() not in names or (size := int(float(match[1]) * names[match[2].upper()])) < 1:
        raise ConfigError(
            f"size {text!r} is none; write a number of bytes, or one with KB, MB, GB, TB (thousands) or KiB, MiB, GiB, "
            "TiB, such as 1GB"
        )
    return size


def shown(size: int) -> str:
    """Return a size for people, rounded up, so that a budget of what is printed is enough."""
    for unit in ("GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{-(-size * 100 // _UNITS[unit]) / 100:.2f} {unit}"
    return f"{size} bytes"
