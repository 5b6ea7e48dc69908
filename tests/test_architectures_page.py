"""docs/architectures.md says what the code does now: a sample of its rows is made again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SAMPLE = ("arcee", "falcon", "bert", "gpt2")
"""All the way; stopped by the reader; refused by its config; a family with a record, refused by its linear modules."""


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("architectures")
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_row_of_the_page_is_what_the_code_does(script: Any, model_type: str) -> None:
    line = script.row_text(script.cover(model_type))
    assert line in script.PAGE.read_text(encoding="utf-8").splitlines(), "write the page again: make coverage"


def test_the_page_has_every_causal_architecture_of_transformers_once(script: Any) -> None:
    lines = script.PAGE.read_text(encoding="utf-8").splitlines()
    names = [line[2:].split(" | ")[0] for line in lines if line.startswith("| ")]
    assert sorted(name for name in names if name != "architecture") == script.model_types()
