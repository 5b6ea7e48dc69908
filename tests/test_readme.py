"""The README's Python runs as written, and its figures come from stored rows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_two_blocks_and_no_more_than_150_lines() -> None:
    assert len(BLOCKS) == 2
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_python_block_runs_as_written(number: int, tmp_path: Path) -> None:
    code = "import torch; torch.set_num_threads(1)\n" + BLOCKS[number]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tables_are_those_of_the_stored_rows() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import json

        from protection_table import MODELS, ROWS, WIDTHS, table
    finally:
        sys.path.pop(0)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for model in MODELS:
        for bits in WIDTHS:
            assert f"<!-- table {model}-int{bits} -->\n{table(rows, model, bits)}<!-- end -->" in results


def test_the_tables_of_the_public_model_are_generated() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import peers_table
        import real_model
    finally:
        sys.path.pop(0)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(real_model.tables()) == 2
    for name, content in real_model.tables().items():
        assert f"<!-- table {name} -->\n{content}<!-- end -->" in results
    assert f"<!-- table peers -->\n{peers_table.first_table().get('peers', '')}<!-- end -->" in README
