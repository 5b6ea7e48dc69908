"""What is fuzzed: every parser of a file that somebody else wrote, with what the commands then do without a model.

A target takes the bytes of a file. It may refuse them, as the commands do: with an error of our own, which is one line.
Anything else (another exception, more than `MOST_SECONDS` of the processor, memory beyond `MOST_BYTES`) is a fault.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

from markupsafe import Markup
from safetensors import SafetensorError, safe_open

from quant_fairness_plugin.artifacts import ExportRecord, SweepReport, load, to_json
from quant_fairness_plugin.checkpoint.folder import RECORD, check_recorded_files, load_record
from quant_fairness_plugin.cli.config_file import read_config_file
from quant_fairness_plugin.cli.saved_plan import planned
from quant_fairness_plugin.cli.tables import plan_list
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.export.source_card import front_matter
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.recommend.frontier import frontier_json, frontier_of
from quant_fairness_plugin.report.page import render_report
from quant_fairness_plugin.report.section import Picture
from quant_fairness_plugin.report.sources import Sources
from quant_fairness_plugin.texts.sources import read_path
from tests.fuzz import CORPUS, MOST_BYTES, MOST_SECONDS, place_in_memory

_DRAWS = 100
_NO_PICTURE = Picture(wide=Markup('<svg width="9">'), narrow=Markup('<svg width="9">'))


class FaultError(Exception):
    """A parser did what it must not."""


def _plan(path: Path) -> None:
    plan, _ = planned(path, FairConfig())
    assert plan is not None
    plan_list(plan)
    _ = plan.overrides, plan.singled_out, plan.overrides_in(0), Sources.of([plan]).model
    to_json(plan)


def _sweep(path: Path) -> None:
    report = load(SweepReport, path)
    _ = report.modes, report.units
    to_json(report)
    frontier_json(frontier_of(report, draws=_DRAWS), report)
    for limit, top in ((Limit(max_overhead=0.2), None), (Limit(max_overhead=0.2), 1)):
        plan_list(recommend_plan(report, limit, top=top, draws=_DRAWS))


def _record(path: Path) -> None:
    record = load(ExportRecord, path)
    to_json(record)
    _ = record.grids, record.sizes, record.plan.singled_out
    sources = Sources.of([record])
    with patch.object(Picture, "of", lambda chart, text: _NO_PICTURE):  # a second each, and never of what a file says
        render_report(sources)
    if record.experts is not None:
        list(record.experts.lines())


def _folder(path: Path) -> None:
    check_recorded_files(path.parent, load_record(path.parent))


def _config_json(path: Path) -> None:
    read_config_file(path)


def _texts(path: Path) -> None:
    read_path(path)


def _header(path: Path) -> None:
    read_header(path)
    try:  # what we accept, the library must accept too
        with safe_open(path, framework="numpy") as file:
            file.keys()
    except SafetensorError as err:
        raise FaultError(f"accepted what the library refuses: {err}") from err


def _model(path: Path) -> None:
    resolve_model(str(path.parent))


def _card(path: Path) -> None:
    for key, value in front_matter(path).items():
        json.dumps([key, value])


TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "plan": ("plan.json", _plan),
    "sweep": ("sweep.json", _sweep),
    "record": ("record.json", _record),
    "folder": (RECORD, _folder),
    "config-yaml": ("fair.yaml", _config_json),
    "config-json": ("fair.json", _config_json),
    "texts-json": ("texts.json", _texts),
    "texts-jsonl": ("texts.jsonl", _texts),
    "texts-tsv": ("texts.tsv", _texts),
    "header": ("model.safetensors", _header),
    "index": ("model.safetensors.index.json", _model),
    "model-config": ("config.json", _model),
    "card": ("README.md", _card),
}
"""Name → the file that is fuzzed, and what reads it."""


class Target:
    """One target in a folder of its own, which holds the file that is fuzzed and the ones around it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        file, self._read = TARGETS[name]
        around = CORPUS / name / "around"
        if around.is_dir():
            shutil.copytree(around, folder, dirs_exist_ok=True)
        self.path = folder / file
        self.file = self.path.open("wb", buffering=0)  # once: to open a file anew takes as long as to parse a short one
        good = CORPUS / name / "good"
        if good.is_file():
            with suppress(QuantFairnessError):  # a schema that has changed is said by the test
                self.read(good.read_bytes())  # what is loaded at first use is no file's time or memory
        self._start = _peak()

    def __call__(self, content: bytes) -> bool:
        """Read the bytes; return whether they were accepted.

        Raises:
            FaultError: time, memory, or a message of more than one line.
            Exception: whatever escapes.
        """
        begun, accepted = time.process_time(), True
        try:
            self.read(content)
        except QuantFairnessError as err:
            accepted = False
            if not str(err):
                raise FaultError("an error without a word") from err
        seconds, grown = time.process_time() - begun, _peak() - self._start
        if seconds > MOST_SECONDS:
            raise FaultError(f"took {seconds:.1f} s")
        if grown > MOST_BYTES:
            raise FaultError(f"took {grown >> 20} MiB")
        return accepted

    def read(self, content: bytes) -> None:
        """Read the bytes, however long it takes.

        Raises:
            Exception: whatever escapes, refusals among it.
        """
        self.file.seek(0)
        self.file.write(content)
        self.file.truncate()
        self._read(self.path)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def opened(name: str) -> Iterator[Target]:
    """Yield a target in a temporary folder."""
    with place_in_memory() as folder:
        target = Target(name, Path(folder))
        with target.file:
            yield target


def seeds(name: str) -> list[bytes]:
    """Return the corpus of a target: well-formed files, and what once went wrong."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir()) if path.is_file()]
