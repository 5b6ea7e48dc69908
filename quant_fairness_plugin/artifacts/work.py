"""What the results in a folder to go on from were made under, so that a run that cannot use them says why."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts.files import digest, write_atomically

_logger = logging.getLogger(__name__)


def note_circumstances(folder: Path, question: Mapping[str, Any], circumstances: Mapping[str, Any]) -> None:
    """Warn where a folder has results for the same question under other circumstances alone, naming what differs.

    Results are named by both, so that another number of threads or another version of torch, which change the last bits
    of sums, make a run start over. Without this it would do so without a word.

    Args:
        folder: an existing folder.
        question: what the results are of (model, plan, text, …); plain data.
        circumstances: what else their bits depend on (threads, versions, device, …); plain data.
    """
    path = folder / f"{digest(dict(question))[:16]}.made-under"
    here, before = json.loads(json.dumps(dict(circumstances))), _read(path)
    if here in before:
        return
    if before:
        differs = "; ".join(
            f"{name} {there!r} there, {now!r} here" for name, there, now in _differences(before[-1], here)
        )
        _logger.warning("%s: what is there gives other last bits and is not gone on from (%s)", folder, differs)
    write_atomically(path, (json.dumps([*before, here], indent=1) + "\n").encode())


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the circumstances that a folder has results of; none where the file is missing or nobody can read it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{name}.")
        elif one != other:
            yield f"{prefix}{name}", one, other
