"""Read tables of comma-separated and tab-separated values: one reader, for every option that takes texts."""

from __future__ import annotations

import csv
import io
import reprlib
from dataclasses import dataclass
from pathlib import Path

from quant_fairness_plugin.documents import first_repeated
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.texts.columns import name_quoted_columns
from quant_fairness_plugin.texts.lines import read_corpus, read_lines

COMMAS = ".csv"
"""How the names of tables with commas end, in upper or lower case."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells by column, each column once, and where each row is."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, str]], ...]


def read_table(path: Path) -> Table:
    """Return a table whose first line names its columns; empty lines at its end are no rows.

    In a `.csv` file a cell in quotes may hold commas and line ends. Others have tabs between the cells, and quotes are
    ordinary characters there; a word is said where they are around every cell of a column.

    Raises:
        ArtifactError: it cannot be read, a column is there twice, or a row has more or fewer cells; says where.
    """
    commas = path.suffix.lower() == COMMAS
    header, *lines = _cells(path, commas=commas) or [[]]
    if len(set(header)) < len(header):
        raise ArtifactError(
            f"{path}: column {reprlib.repr(first_repeated(header))} occurs twice; name each column once"
        )
    unit = "row" if commas else "line"
    rows: list[tuple[str, dict[str, str]]] = []
    for number, cells in enumerate(lines, start=2):
        where = f"{path} {unit} {number}"
        if len(cells) != len(header):
            raise ArtifactError(
                f"{where}: {len(cells)} cells; the first line names {len(header)} columns. Mend the {unit}."
            )
        rows.append((where, dict(zip(header, cells, strict=True))))
    if not commas:
        name_quoted_columns(header, lines, str(path))
    return Table(tuple(header), tuple(rows))


def _cells(path: Path, *, commas: bool) -> list[list[str]]:
    if not commas:
        return [line.split("\t") for line in read_lines(path)]
    try:
        rows = list(csv.reader(io.StringIO(read_corpus(path), newline=""), strict=True))
    except csv.Error as err:
        raise ArtifactError(f"{path}: not a table of comma-separated values ({err}); mend the file") from err
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    return rows
