"""The answer of `analyze` to one question, as its file holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisAnswer:
    """A named question and its answer; the fields of `result` are those of the analysis' own dataclass."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["analysis"] = "analysis"
    analysis: str
    question: str = ""
    provenance: dict[str, Any]
    result: dict[str, Any]
