from __future__ import annotations

from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.claims import references
from quant_fairness_plugin.cli.main import app, run_guarded

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), ["cite", *arguments], "quant-fairness")


def test_every_entry_is_read_and_on_the_page() -> None:
    text = Path(references.__file__).with_name("references.bib").read_text(encoding="utf-8")
    entries = references.references()
    assert len(entries) == text.count("\n@") + 1 == 9
    page = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    assert text in page
    assert all(f"| `{key}` |" in page for key in entries)


def test_entries_are_printed_by_key_and_an_unknown_key_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lin2024") == 0
    assert capsys.readouterr().out.startswith("@inproceedings{lin2024,")
    assert run() == 0
    assert capsys.readouterr().out.count("@") == 9
    assert run("nobody1999") == 2
    assert "there is no reference 'nobody1999'; there are quantdisparity2026" in capsys.readouterr().err
