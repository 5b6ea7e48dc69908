"""Which real reader loaded a checkpoint when it was verified, and what it computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderRun:
    """A reader that was run on a checkpoint and computed what its files say."""

    reader: str
    """A name of `checkpoint.readers.READERS`."""
    version: str
    dtype: str
    """What it computed in, which need not be what the checkpoint is served in."""
    detail: str
    """How close it came, as a clause."""

    def __str__(self) -> str:
        return f"{self.reader} {self.version} in {self.dtype}: {self.detail}"
