"""Tables of stored rows into the pages that show them: between `<!-- table NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from quant_fairness_plugin.artifacts import write_atomically


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Replace the tables of a page.

    Raises:
        SystemExit: the page has no place for one.
    """
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page}: no place for the table {name}")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}{match[2]}", text)
    write_atomically(page, text.encode())
