"""Verify: everything that can be wrong with a checkpoint folder, cheapest check first.

Files against `quant_fairness.json`, headers, metadata, tensors, each reader's rules, and last a real reader. Folders
that other tools wrote have no such file: they are judged by their tensors. The files are checked before torch is
imported.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quant_fairness_plugin.artifacts import ExportRecord, ReaderRun, Undefined
from quant_fairness_plugin.checkpoint.folder import (
    RECORD,
    check_headers,
    check_recorded_files,
    load_record,
    read_config,
)
from quant_fairness_plugin.checkpoint.formats import stored_format
from quant_fairness_plugin.checkpoint.readers import READERS, check_metadata, find_reader, reader_problems
from quant_fairness_plugin.checkpoint.readers.case import Case, TensorFacts
from quant_fairness_plugin.checkpoint.readers.running import find_python
from quant_fairness_plugin.checkpoint.readers.transformers import TRANSFORMERS
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.freed import returned_when_freed
from quant_fairness_plugin.model.sizes import shown

if TYPE_CHECKING:
    from quant_fairness_plugin.checkpoint.inspection import Inspection

Outcome = Literal["passed", "not run"]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check that did not fail. A failed one is an error."""

    name: str
    outcome: Outcome
    detail: str
    """What was seen, or why the check was not run."""
    run: ReaderRun | None = None
    """Of the check `reader`: which one computed, and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """The checks of a folder that `verify` ran, and each reader's problems."""

    folder: str
    format: str
    """As recorded, else the `quant_method` of the metadata, or `fp16-twin` for a plain checkpoint."""
    checks: tuple[CheckResult, ...]
    problems: dict[str, str] = field(default_factory=dict)
    """Reader → what it would get wrong by its own rules, in one sentence; empty where nothing."""
    notes: dict[str, str] = field(default_factory=dict)
    """Reader → how far that goes; empty where it was compared with the real reader."""

    @property
    def reader_run(self) -> ReaderRun | Undefined:
        """The reader that was run, or why none was."""
        check = next(check for check in self.checks if check.name == "reader")
        return check.run or Undefined(check.detail)

    @property
    def complete(self) -> bool:
        """Whether every check was run."""
        return all(check.outcome == "passed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "folder": self.folder,
            "format": self.format,
            "complete": self.complete,
            "checks": [{"name": c.name, "outcome": c.outcome, "detail": c.detail} for c in self.checks],
            "readers": [
                {"reader": name, "reads": not text, "problem": text, "note": self.notes.get(name, "")}
                for name, text in self.problems.items()
            ],
        }


@returned_when_freed()
def verify(
    folder: str | Path,
    *,
    reader: str | None = None,
    python: Path | None = None,
    rows: Sequence[Sequence[int]] = (),
    memory_budget: int | None = None,
) -> VerifyReport:
    """Check a checkpoint folder of any origin, from file checksums to the numbers of a real reader.

    Args:
        folder: a checkpoint folder, ours or another tool's.
        reader: one of `READERS`, which is run and must compute what the files say; None: Transformers, where it can
            load the folder here, otherwise reported as not run.
        python: the Python that has the reader; None looks in this one, then in the environment variable of the reader
            (see `checkpoint.readers`).
        rows: token ids on which it is also run in the dtype that it is served in, such as rows of its calibration.
        memory_budget: bytes; a reader that nobody asked for is not run where it would hold more.

    Returns:
        The checks that passed, those that could not be run here with the reason, and what each reader would get wrong
        by its own rules.

    Raises:
        ArtifactError: a file, tensor or metadata rule is wrong; names it.
        UnsupportedModelError: the wanted reader cannot load this checkpoint, or computes something else.
        MissingExtraError: the wanted reader is not installed in the Python that was tried.
        ConfigError: an unknown reader, one of which only documented rules are checked, or a Python that cannot be run.
    """
    folder = Path(folder)
    wanted = None if reader is None else find_reader(reader)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected a checkpoint folder. Check the path.")
    if wanted is not None and wanted.script and wanted is not TRANSFORMERS:
        python = find_python(wanted.name, python)  # first of all: an absent reader is a usage error
    format_name, checks, case = _check_recorded(folder) if (folder / RECORD).is_file() else _check_foreign(folder)
    problems = reader_problems(case)
    if all(problem for name, problem in problems.items() if READERS[name].script):
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise UnsupportedModelError(f"{folder}: no reader reads it right. {listed}. Try quant-fairness repair.")
    checks.append(_check_served(folder, rows))
    too_large = None if reader else _exceeding(folder, case, memory_budget)
    checks.append(too_large or _check_reader(folder, case, reader, python, problems))
    for check in checks:
        _logger.info("%s: %s %s: %s", folder, check.name, check.outcome, check.detail)
    notes = {name: entry.note_on(case.quantization) for name, entry in READERS.items()}
    return VerifyReport(folder=str(folder), format=format_name, checks=tuple(checks), problems=problems, notes=notes)


def _check_recorded(folder: Path) -> tuple[str, list[CheckResult], Case]:
    """One of our exports: everything must be as recorded, and universal. Imports torch once the files are sound."""
    record = load_record(folder)
    checks = [CheckResult("files", "passed", check_recorded_files(folder, record))]
    shapes = check_headers(folder)
    config, quantization = read_config(folder)

    from quant_fairness_plugin.checkpoint.columns import check_columns
    from quant_fairness_plugin.checkpoint.copied import check_copies
    from quant_fairness_plugin.checkpoint.dequantize import bare_model
    from quant_fairness_plugin.checkpoint.inspection import check_tensor_list, check_values, modules_by_tensors
    from quant_fairness_plugin.model.families import detect_family

    model = bare_model(folder)
    family = detect_family(model)
    modules = modules_by_tensors(model, family, shapes, record)
    layout = stored_format(record.format, record.plan.grid)
    metadata = check_metadata(layout, modules, quantization or {})
    if not layout.packs:
        metadata = "none: a plain 16-bit checkpoint"
    listed = check_tensor_list(model, family, modules, shapes, record, str(config.get("dtype")))
    checks += [
        CheckResult("headers", "passed", f"{len(shapes)} tensors, each once"),
        CheckResult("metadata", "passed", metadata),
        CheckResult("tensors", "passed", listed),
        CheckResult("values", "passed", check_values(folder, record)),
    ]
    if record.copied_tensors:
        checks.append(CheckResult("copies", "passed", check_copies(folder, record)))
    if columns := check_columns(folder, record, model, str(config.get("dtype"))):
        checks.append(CheckResult("columns", "passed", columns))
    case = Case(modules=modules, family=family, quantization=quantization or {}, facts=_checked_facts(record))
    return record.format, checks, case


def _checked_facts(record: ExportRecord) -> TensorFacts:
    """What `check_values` and `check_tensor_list` have just shown to hold."""
    return TensorFacts(symmetric=record.plan.grid.symmetric, ordered=True, wrapped_zeros=False)


def _check_foreign(folder: Path) -> tuple[str, list[CheckResult], Case]:
    """A folder that another tool wrote: its tensors say what is quantized, and each reader is judged on its own."""
    from quant_fairness_plugin.checkpoint.inspection import inspect_checkpoint

    seen = inspect_checkpoint(folder)
    if seen.announced_dtype != seen.dtype:
        raise ArtifactError(
            f"{folder}: the tensors are {seen.dtype}, config.json says {seen.announced_dtype}; they must agree. "
            "quant-fairness repair puts that right."
        )
    checks = [
        CheckResult("files", "not run", f"no {RECORD}: another tool wrote this, there are no checksums to compare"),
        CheckResult("headers", "passed", f"{seen.tensors} tensors, each once"),
        CheckResult("metadata", "passed", _metadata_summary(seen)),
        CheckResult("tensors", "passed", f"exactly those of {seen.family.name}, {seen.dtype}"),
        CheckResult("values", "passed", "all finite, groups within range"),
    ]
    return seen.case.method if seen.quantization else "fp16-twin", checks, seen.case


def _metadata_summary(seen: Inspection) -> str:
    if not seen.quantization:
        return "none: a plain 16-bit checkpoint"
    widths = sorted({module.bits for module in seen.packed.values()})
    return (
        f"{seen.layout} in {seen.source}; {len(seen.modules.quantized)} modules of "
        f"{' and '.join(map(str, widths)) or 'no'} bits, {len(seen.modules.kept)} in 16 bit"
    )


def _check_served(folder: Path, rows: Sequence[Sequence[int]]) -> CheckResult:
    from quant_fairness_plugin.checkpoint.served import compare_served

    return CheckResult("served", "passed", compare_served(folder, rows))


def _check_reader(
    folder: Path, case: Case, reader: str | None, python: Path | None, problems: dict[str, str]
) -> CheckResult:
    from quant_fairness_plugin.checkpoint.readers.compare import (
        HALF_PRECISION_KERNELS,
        compare_with_reader,
        compare_with_transformers,
        missing_packages,
    )

    problem = problems[reader or "transformers"]
    if reader is not None and problem:
        others = ", ".join(_with_note(name) for name, text in problems.items() if not text)
        raise UnsupportedModelError(f"{folder}: {reader} does not read it right: {problem}. Allowed: {others}.")
    if reader is not None and (why := READERS[reader].on_gpu(case.quantization)):
        raise UnsupportedModelError(
            f"{folder}: {reader} is run on a CPU here, and {why}. Allowed: --reader transformers; or load it in "
            f"{reader} on a GPU and compare what it answers."
        )
    missing = " and ".join(missing_packages(case.method))
    here = reader in (None, "transformers") and not missing and not problem and python is None
    if here and case.method in HALF_PRECISION_KERNELS:
        return _ran(compare_with_reader(folder, "transformers", Path(sys.executable)))
    if here:
        return _ran(compare_with_transformers(folder))
    if reader is None:
        reason = (
            f"Transformers needs {missing} for {case.method}, not installed here; install with: {TRANSFORMERS.install}"
        )
        return CheckResult("reader", "not run", problem or reason)
    return _ran(compare_with_reader(folder, reader, python or find_python(reader)))


def _ran(run: ReaderRun) -> CheckResult:
    return CheckResult("reader", "passed", str(run), run)


def _exceeding(folder: Path, case: Case, memory_budget: int | None) -> CheckResult | None:
    """Say that the reader was not run, where it would hold more than the memory budget; None where it can be."""
    if memory_budget is None:
        return None
    from quant_fairness_plugin.checkpoint.readers.compare import held_by_transformers

    needed = held_by_transformers(folder, case)
    if needed <= memory_budget:
        return None
    return CheckResult(
        "reader", "not run",
        f"Transformers would hold {shown(needed)}, more than the memory budget of {shown(memory_budget)}; "
        "quant-fairness verify runs it without one",
    )  # fmt: skip


def _with_note(name: str) -> str:
    note = READERS[name].note
    return f"{name} ({note})" if note else name
