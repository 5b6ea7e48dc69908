"""What every document carries: what its numbers came from, and that nothing else stands in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

NO_SURPRISES = ConfigDict(extra="forbid")
"""A document with a field that this version does not know was written by another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a number came from: enough to make it again."""

    versions: dict[str, str]
    model: str
    model_sha256: str
    text_set: str
    text_sha256: str
    arguments: dict[str, Any]
    """The arguments as resolved, defaults included."""
    seed: int
    device: str = ""
    """Where the model was computed; empty in results that do not say."""
    dtype: str = ""
    """What it was computed in, `float32` or `bfloat16`; empty in results that do not say."""
    source: str = ""
    """What the 16-bit model was computed from, where its files do not hold it: FP8 or MXFP4 weights."""
    start: str = ""
    """What stood before every text that was measured, a `Start` other than `auto`; empty in results that do not say."""
