"""Step 7, verify: everything that can be wrong with an exported folder, cheapest check first.

Files against `quant_fairness.json`, headers, metadata, tensors, and last a real loader. The first three need no torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quant_fairness_plugin.artifacts import CheckpointFormat, ExportRecord
from quant_fairness_plugin.errors import ConfigError, MissingExtraError, UnsupportedModelError
from quant_fairness_plugin.export.check_files import check_headers, check_recorded_files, load_record, read_config
from quant_fairness_plugin.export.check_metadata import check_metadata
from quant_fairness_plugin.export.formats import READERS

Outcome = Literal["passed", "not run"]
_CONV1D = "Transformers loads quantized Conv1D modules (GPT-2) as garbage"
_NO_VLLM = "vLLM lives in an environment of its own; run `make test-readers`"
_INSTALL = "pip install torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check that did not fail. A failed one is an error."""

    name: str
    outcome: Outcome
    detail: str
    """What was seen, or why the check was not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` looked at in a folder."""

    folder: str
    format: CheckpointFormat
    checks: tuple[CheckResult, ...]

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
        }


def verify(folder: str | Path, *, reader: str | None = None) -> VerifyReport:
    """Check an exported folder, from file checksums to the logits of a real loader.

    Args:
        folder: a checkpoint folder written by `export`.
        reader: `transformers`; `vllm`, which lives in an environment of its own, so that its logits are reported as not
            compared; None: Transformers where it can load the folder, otherwise reported as not compared.

    Returns:
        The checks that passed, and those that could not be run here, with the reason.

    Raises:
        ArtifactError: a file, tensor or metadata rule is wrong; names it.
        UnsupportedModelError: the wanted reader cannot load this checkpoint, or computes something else.
        MissingExtraError: the wanted reader needs packages that are not installed.
        ConfigError: an unknown reader.
    """
    folder = Path(folder)
    if reader not in (None, *READERS):
        raise ConfigError(f"unknown reader {reader!r}; allowed are {', '.join(READERS)}. Correct --reader.")
    record = load_record(folder)
    checks = [CheckResult("files", "passed", check_recorded_files(folder, record))]
    contents, conv1d = _check_contents(folder, record)
    checks += [*contents, _check_reader(folder, record, reader, conv1d=conv1d)]
    for check in checks:
        _logger.info("%s: %s %s: %s", folder, check.name, check.outcome, check.detail)
    return VerifyReport(folder=str(folder), format=record.format, checks=tuple(checks))


def _check_contents(folder: Path, record: ExportRecord) -> tuple[list[CheckResult], bool]:
    """Headers, metadata, tensors; and whether quantized modules are Conv1D. Imports torch, once the files are sound."""
    shapes = check_headers(folder)
    config, quantization = read_config(folder)

    from quant_fairness_plugin.export.check_tensors import check_tensor_list, check_values, modules_by_tensors
    from quant_fairness_plugin.export.dequantize import bare_model
    from quant_fairness_plugin.model.families import detect_family

    model = bare_model(folder)
    family = detect_family(model)
    modules = modules_by_tensors(model, family, shapes, record)
    metadata = "none: a plain 16-bit checkpoint"
    if quantization is not None or record.format != "fp16-twin":
        metadata = check_metadata(modules, quantization or {})
    listed = check_tensor_list(model, family, modules, shapes, record, str(config.get("dtype")))
    results = [
        CheckResult("headers", "passed", f"{len(shapes)} tensors, each once"),
        CheckResult("metadata", "passed", metadata),
        CheckResult("tensors", "passed", listed),
        CheckResult("values", "passed", check_values(folder, record)),
    ]
    return results, family.conv1d and bool(modules.quantized)


def _check_reader(folder: Path, record: ExportRecord, reader: str | None, *, conv1d: bool) -> CheckResult:
    from quant_fairness_plugin.export.check_reader import compare_with_transformers, missing_packages

    missing = " and ".join(missing_packages(record.format))
    if reader == "transformers" and conv1d:
        raise UnsupportedModelError(
            f"{folder}: {_CONV1D}; allowed are --reader vllm and the format fp16-twin. Use those."
        )
    if reader == "transformers" and missing:
        raise MissingExtraError(
            f"Transformers needs {missing} for {record.format}, not installed here; install with: {_INSTALL}. "
            "Or leave --reader out, to check all else."
        )
    reason = _NO_VLLM if reader == "vllm" else _CONV1D if conv1d else ""
    if missing and not reason:
        reason = f"Transformers needs {missing} for {record.format}, not installed here; install with: {_INSTALL}"
    if reason:
        return CheckResult("reader", "not run", reason)
    difference = compare_with_transformers(folder)
    return CheckResult("reader", "passed", f"Transformers: logits within {difference:.2g} of the dequantized weights")
