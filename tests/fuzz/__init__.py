"""Fuzzing of every parser of files; see `targets`. Nothing heavy is imported here."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
"""A folder for each target: well-formed files, and what once went wrong."""
LONGEST = 64_000
"""Bytes of a file that is made."""
MOST_SECONDS = 1.0
"""Of the processor, for one file."""
MOST_BYTES = 256 << 20
"""By which the memory of a process may grow."""


def place_in_memory() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder, in memory where the system has such a place."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=shared if shared.is_dir() else None)


def content_name(content: bytes) -> str:
    """Return the name in the corpus of a file that fuzzing found; files that somebody wrote are named in words."""
    return hashlib.sha256(content).hexdigest()[:16]


def is_found(path: Path) -> bool:
    """Return whether fuzzing found this file of the corpus."""
    return re.fullmatch(r"[0-9a-f]{16}", path.name) is not None
