"""One session of the reader matrix: the exports that its cells need, each made once, and one process per environment.

A reader's packages take seconds to import and a server a minute to start, so the checkpoints of all chosen cells are
read in turn (`batch.py`): by one process in gptqmodel and in Transformers, by one child each in vLLM.
"""

from __future__ import annotations

import json
import os
import subprocess
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.artifacts import Reader
from quant_fairness_plugin.checkpoint.readers import find_reader
from quant_fairness_plugin.checkpoint.readers.compare import TOLERANCE
from quant_fairness_plugin.checkpoint.readers.running import Reading, reader_script
from quant_fairness_plugin.checkpoint.readers.vllm import NO_INT4
from quant_fairness_plugin.serve.load import load_quantized
from tests.readers.checkpoints import ROOT, export, load_original, refusal, write_request
from tests.readers.matrix import READERS, Cell, Checkpoint
from tests.readers.reading import Judged, Models
from tests.readers.table import Row, make_row

SECONDS = 600
"""For one checkpoint. A server of a tiny model takes ten on a free core, and a hundred beside seven other jobs."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""Two threads wait for each other on a busy machine; and each process would compile C++ for every model (half the time
of a reading) although the tiny models gain nothing by it."""
HAS_AVX512: bool = torch.cpu._is_avx512_supported()
FORKED: tuple[Reader, ...] = ("vllm",)
"""What cannot be loaded twice in one process, but forked after its import."""


@dataclass
class MatrixSession:
    """Answers of all chosen cells."""

    root: Path
    cells: Sequence[Cell]
    answers: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    not_exported: dict[Checkpoint, str] = field(default_factory=dict)
    """Traceback of an export that failed. The other cells go on."""
    _models: tuple[Checkpoint, Models] | None = None
    _judged: dict[Cell, Judged | str] = field(default_factory=dict)
    _refusals: dict[Cell, str | None] = field(default_factory=dict)

    @classmethod
    def run(cls, cells: Sequence[Cell], root: Path) -> MatrixSession:
        """Make the checkpoints, and have every reader read them whose environment is there."""
        session = cls(root, [cell for cell in cells if built(cell.environment)])
        for made in dict.fromkeys(cell.checkpoint for cell in session.cells):
            session._export(made)
        # vLLM takes as long as all others together, so it has a core of its own.
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(session._read_all, vllm=vllm) for vllm in (True, False)]
        for lane in done:
            lane.result()
        for cell in session._exported_cells():  # in this order each model is loaded once
            session.judged(cell)
        return session

    def folder(self, made: Checkpoint) -> Path:
        """Where a checkpoint is."""
        return self.root / made.name

    def _models_of(self, made: Checkpoint) -> Models:
        """The original and our reading of a checkpoint; the last ones are kept, because cells come in this order."""
        if self._models is None or self._models[0] is not made:
            self._models = (
                made,
                Models(load_original(made, self.root), load_quantized(self.folder(made), kernel="reference")),
            )
        return self._models[1]

    def judged(self, cell: Cell) -> Judged | str:
        """The numbers of a cell, or the end of the reader's traceback."""
        assert cell.checkpoint not in self.not_exported, self.not_exported[cell.checkpoint]
        if cell not in self._judged:
            answer = self.answers[cell]
            self._judged[cell] = answer.get("error") or self._models_of(cell.checkpoint).judge(
                Reading(cell.reader, answer["version"], answer["methods"], tuple(answer["sequences"])),
                self.folder(cell.checkpoint),
            )
        return self._judged[cell]

    def missing_here(self, cell: Cell) -> str | None:
        """What the reader's build lacks on this CPU and not on others, so that the cell has no result; else None.

        Told by the error itself: a cell that is refused, or wrong, for another reason is judged on every CPU.
        """
        error = self.answers.get(cell, {}).get("error", "")
        lacking = find_reader(cell.reader).missing_kernel(error)
        return lacking if lacking == NO_INT4 and not HAS_AVX512 else None

    def refusal(self, cell: Cell) -> str | None:
        """Why a user who plans this is refused, in the words that he gets; None: the work would begin."""
        if cell not in self._refusals:
            self._refusals[cell] = refusal(cell, self.root)
        return self._refusals[cell]

    def rows(self) -> list[Row]:
        """All cells that were run, for the table; the stored rows of others stay."""
        return [self._row(cell) for cell in self._exported_cells() if self.missing_here(cell) is None]

    def _exported_cells(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.checkpoint not in self.not_exported]

    def _export(self, made: Checkpoint) -> None:
        try:
            export(made, _accepting_reader(made), self.folder(made), self.root)
            write_request(self.folder(made), self.root / f"{made.name}.request.json")
        except Exception:  # noqa: BLE001 # reported by every test of this checkpoint
            self.not_exported[made] = traceback.format_exc()

    def _row(self, cell: Cell) -> Row:
        found, refused = self.judged(cell), self.refusal(cell)
        if isinstance(found, str):
            last = " ".join(found.strip().splitlines()[-1].split())
            last = find_reader(cell.reader).missing_kernel(found) or last
            return make_row(
                cell, refusal=refused, distance=None, mistaken=None, right=False, tried=f"fails, {last[:200]}"
            )
        return make_row(
            cell,
            refusal=refused,
            distance=found.distance,
            mistaken=found.mistaken_distance,
            right=found.distance < TOLERANCE < found.mistaken_distance,
            tried="loads without an error, and "
            + ("computes NaN" if isnan(found.distance) else f"is {found.distance:.3g} units away"),
        )

    def _read_all(self, *, vllm: bool) -> None:
        groups: dict[tuple[Reader, str], list[Cell]] = {}
        for cell in self._exported_cells():
            if (cell.reader == "vllm") == vllm:
                groups.setdefault((cell.reader, cell.environment), []).append(cell)
        for cells in groups.values():
            self._read(cells)

    def _read(self, cells: Sequence[Cell]) -> None:
        reader, environment = cells[0].reader, cells[0].environment
        jobs = [
            {
                "checkpoint": str(self.folder(cell.checkpoint)),
                "request": str(self.root / f"{cell.checkpoint.name}.request.json"),
                "result": str(self.root / f"{cell.name}.json"),
                "seconds": SECONDS,
            }
            for cell in cells
        ]
        listed = self.root / f"{reader}{environment}.jobs.json"
        listed.write_text(json.dumps(jobs), encoding="utf-8")
        command: list[str | Path] = [
            python_of(environment),
            Path(__file__).with_name("batch.py"),
            reader_script(reader),
        ]
        command += [listed, *(["--fork"] if reader in FORKED else [])]
        with (self.root / f"{reader}{environment}.log").open("w", encoding="utf-8") as log:
            subprocess.run(
                command, stdout=log, stderr=log, check=False, cwd=self.root, timeout=SECONDS * len(cells),
                env=os.environ | ENVIRONMENT,
            )  # fmt: skip
        for cell, job in zip(cells, jobs, strict=True):
            path = Path(str(job["result"]))
            ended = {"error": f"{reader} ended without an answer; see {log.name}"}
            self.answers[cell] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ended


def skip_without_int4_kernel() -> None:
    """Skip a test that has vLLM's CPU build compute 4-bit weights, where it has no kernel for them."""
    if not HAS_AVX512:
        pytest.skip(f"vLLM: {NO_INT4}")


def built(environment: str) -> bool:
    """Whether `make test-readers` has built a virtual environment."""
    return (ROOT / environment / ".installed").exists()


def python_of(environment: str) -> Path:
    """The Python of a virtual environment; skips the test where it is not built."""
    if not built(environment):
        pytest.skip(f"{environment} is not built; `make test-readers` builds it")
    return ROOT / environment / "bin" / "python"


def _accepting_reader(made: Checkpoint) -> Reader:
    """A reader that may have the checkpoint: the files are the same whoever asks."""
    return next(reader for reader in READERS if Cell(made, reader).refusal is None)
