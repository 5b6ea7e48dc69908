"""The figures of the documentation are those of the stored rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("benchmark", ["controls_table", "sweep", "columns", "beginnings_table", "effort_table"])
def test_the_tables_are_those_of_the_stored_rows(benchmark: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        module = importlib.import_module(benchmark)
    finally:
        sys.path.pop(0)
    page = module.PAGE.read_text(encoding="utf-8")
    for name, content in module.tables().items():
        assert f"<!-- table {name} -->\n{content}<!-- end -->" in page, (
            f"{name}: write the page again with benchmarks/{benchmark}.py"
        )
