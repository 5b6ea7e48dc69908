"""The figures of the documentation are those of the stored rows, and rows say how they were made."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_REVISION = frozenset(
    {"calibration_table", "clip_table", "columns", "controls_table", "plan_table", "protection_table", "sweep"}
)
"""Their rows are older than these fields. A script that is measured again leaves this list, and none joins it."""


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    return tables


SCRIPTS = re.findall(r'^    "(\w+)",$', (ROOT / "benchmarks" / "tables.py").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_what_its_rows_make(
    name: str, tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tables.script(name)
    page = module.PAGE.read_text(encoding="utf-8")
    again = tmp_path / "page.md"
    again.write_text(page, encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", again)
    module.render()
    assert again.read_text(encoding="utf-8") == page, "the page was edited, or its rows changed: make tables"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_row_says_when_and_by_what_it_was_made(name: str, tables: ModuleType) -> None:
    for row in tables.rows_of(tables.script(name)):
        assert {"versions", "machine", "command"} <= row.keys()
        assert {"finished", "revision"} <= row.keys() or name in WITHOUT_REVISION


def test_every_script_with_a_page_is_rendered_by_make_tables() -> None:
    scripts = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if re.search("^PAGE = ", path.read_text("utf-8"), re.M)
    }
    assert scripts == set(SCRIPTS)
