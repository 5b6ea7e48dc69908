"""The works that this library builds on, as BibTeX. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from quant_fairness_plugin.errors import ConfigError

_ENTRY = re.compile(r"^@\w+\{([^,]+),.*?^\}", re.DOTALL | re.MULTILINE)


@cache
def references() -> dict[str, str]:
    """Return key → BibTeX entry, in the order of the file."""
    text = files("quant_fairness_plugin.claims").joinpath("references.bib").read_text(encoding="utf-8")
    return {entry[1]: entry[0] for entry in _ENTRY.finditer(text)}


def cited(keys: Sequence[str]) -> list[str]:
    """Return the entries of these keys, all where there are none.

    Raises:
        ConfigError: a key that does not exist.
    """
    known = references()
    if unknown := [key for key in keys if key not in known]:
        raise ConfigError(f"there is no reference {unknown[0]!r}; there are {', '.join(known)}")
    return [known[key] for key in keys or known]
