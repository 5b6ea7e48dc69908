"""The commands that are put through faults: what each starts from, and what it may leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.export.foreign_folders import gptqmodel
from tests.export.gguf_files import write_gguf_of
from tests.planted_model import planted_texts, write_planted_model

SENTENCES = 6
TEXTS = ("--texts", "t.json")
QUANTIZE = (*TEXTS, "--group-size", "32", "--protect-layers", "1,2")
FORCED = ("--memory-budget", "4MB", "--work", "work")
"""Block by block, with all that is kept to go on from."""


@dataclass(frozen=True, slots=True)
class Case:
    """A command, in a folder of its own."""

    name: str
    command: tuple[str, ...]
    outputs: tuple[str, ...]
    """Files and folders that the command makes or replaces: each is at any time as before, or complete, or not there
    where it was not there before."""
    prepare: tuple[tuple[str, ...], ...] = ()
    """Commands that make what this one starts from."""
    changed: Callable[[Path], None] | None = None
    """What is done to the folder after that."""
    pieces: bool = False
    """Whether the outputs are a folder's files, each of which is replaced by itself."""
    warms: bool = False
    """Whether running it once loads what others need."""


def _as_other_tool(folder: Path) -> None:
    """Make our export one of gptqmodel's."""
    gptqmodel(folder / "theirs")
    (folder / "theirs" / "model.safetensors").rename(folder / "theirs" / "gptq_model-4bit-32g.safetensors")


def _with_gguf(folder: Path) -> None:
    """Write the GGUF file of the model."""
    write_gguf_of(folder / "model", folder / "like.gguf")


_QUANTIZE, _RUN = ("quantize", "model", *QUANTIZE), ("run", "--model", "model", *QUANTIZE)
_OVER = ("-o", "out", "--overwrite")
_OLD = ("quantize", "model", *QUANTIZE, "--method", "rtn", "-o", "out")
_THEIRS = ("quantize", "model", *QUANTIZE, "--format", "gptq", "--reader", "gptqmodel", "-o", "theirs")
_SWEEP = ("sweep", "--model", "model", *TEXTS, "--group-size", "32", "--top", "1", "-o", "s.json")
_MEASURE = ("measure", "out", "--model", "model", *TEXTS, "-o", "m.json")
_SWEPT = ("s.json", "s.html", "s.run.json")

CASES = (
    Case("report", ("report", "out", "-o", "r.html"), ("r.html",), (_OLD,), warms=True),
    Case("repair", ("repair", "theirs", "-o", "out"), ("out",), (_THEIRS,), _as_other_tool),
    Case("repair --in-place", ("repair", "theirs", "--in-place"), ("theirs",), (_THEIRS,), _as_other_tool, pieces=True),
    Case("gguf", ("gguf", "out", "--like", "like.gguf", "-o", "o.gguf"), ("o.gguf",), (_OLD,), _with_gguf),
    Case("measure --work", (*_MEASURE, *FORCED), ("m.json", "m.run.json"), (_OLD,)),
    Case("sweep --work", (*_SWEEP, "--work", "work"), _SWEPT, warms=True),
    Case("sweep --work --memory-budget", (*_SWEEP, *FORCED), _SWEPT),
    Case("quantize", (*_QUANTIZE, "-o", "out"), ("out",)),
    Case("quantize --work --memory-budget --overwrite", (*_QUANTIZE, *FORCED, *_OVER), ("out",), (_OLD,)),
    Case("run", (*_RUN, "-o", "out"), ("out",), warms=True),
    Case("run --overwrite", (*_RUN, *_OVER), ("out",), (_OLD,)),
)


def write_start(folder: Path) -> None:
    """Write what every command starts from: a small model that knows two languages, and a text in them."""
    write_planted_model(folder / "model")
    few = {language: list(rows[:SENTENCES]) for language, rows in planted_texts().sentences.items()}
    (folder / "t.json").write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")
    (folder / "tmp").mkdir()
