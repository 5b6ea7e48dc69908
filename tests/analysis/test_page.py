"""The figures of docs/calibration.md are those of the stored rows."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_stored_rows() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from calibration_table import PAGE, ROWS, read_rows, tables
    finally:
        sys.path.pop(0)
    page = PAGE.read_text(encoding="utf-8")
    for name, content in tables(read_rows(ROWS)).items():
        assert f"<!-- table {name} -->\n{content}<!-- end -->" in page, (
            f"{name}: run benchmarks/calibration_table.py render"
        )
