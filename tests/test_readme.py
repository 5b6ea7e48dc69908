"""The README's Python runs as written, and its figures come from stored rows.

Here tiny models and texts stand in for the bundled ones; `make test-docs` runs all blocks on these.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.planted_model import planted_texts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_two_blocks_and_no_more_than_150_lines() -> None:
    assert len(BLOCKS) == 2
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_python_block_runs_as_written(
    number: int, tiny_model: Callable[..., Path], planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = {"demo": tiny_model("llama", layers=12), "demo-gpt2": planted_model}
    monkeypatch.setattr("quant_fairness_plugin.model.resolve.bundled_folder", stand_ins.__getitem__)
    monkeypatch.setattr("quant_fairness_plugin.seeds.texts.load_texts", lambda *_, **__: planted_texts())
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, Python block {number}", "exec"), {})


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
