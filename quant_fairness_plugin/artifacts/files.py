"""Artifacts as JSON, and files that are complete or not there. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from quant_fairness_plugin.artifacts.analyses import AnalysisAnswer
from quant_fairness_plugin.artifacts.checkpoints import ExportRecord
from quant_fairness_plugin.artifacts.consistency import check
from quant_fairness_plugin.artifacts.evidence import Evidence
from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.artifacts.locks import lock, remove_leftovers
from quant_fairness_plugin.artifacts.measurements import Measurement
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.artifacts.plans import ProtectionPlan
from quant_fairness_plugin.artifacts.scores import UnitScores
from quant_fairness_plugin.artifacts.sweeps import SweepReport
from quant_fairness_plugin.documents import parse_json, read_text
from quant_fairness_plugin.errors import ArtifactError

A = TypeVar(
    "A",
    Measurement,
    CheckpointPair,
    SweepReport,
    UnitScores,
    ProtectionPlan,
    ExportRecord,
    Evidence,
    ExpertCoverage,
    AnalysisAnswer,
)


MOST_ARTIFACT_BYTES = 256_000_000
"""A sweep holds the scores of every sentence under every plan."""


def _adapter(kind: type[A]) -> TypeAdapter[A]:
    return _cached_adapter(cast(Any, kind))


@cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(artifact: A) -> str:
    """The JSON document of an artifact, `schema_version` first.

    Raises:
        ValueError: a number is NaN or infinite; a stage should have returned `Undefined` with a reason.
    """
    plain = _adapter(type(artifact)).dump_python(artifact, mode="python")
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def from_json(kind: type[A], text: str, source: str) -> A:
    """Read an artifact of the given kind.

    Raises:
        ArtifactError: not JSON, another kind or schema version, a field that does not fit (names it), or fields that
            contradict each other.
    """
    try:
        artifact = _adapter(kind).validate_python(parse_json(text))
        check(artifact)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:200] or "document"
        raise _unreadable(kind, source, f"{where}: {first['msg']}") from err
    except ValueError as err:
        raise _unreadable(kind, source, str(err)) from err
    return artifact


def _unreadable(kind: type[A], source: str, what: str) -> ArtifactError:
    return ArtifactError(f"{source}: {what}; expected a {kind.__name__} written by this version. Make it again.")


def save(artifact: A, path: Path) -> None:
    """Write an artifact beside its final name, flush it to disk, then rename."""
    write_atomically(path, to_json(artifact).encode())


def load(kind: type[A], path: Path) -> A:
    """Read an artifact file.

    Raises:
        ArtifactError: the file is missing, unreadable or of another kind.
    """
    try:
        text = read_text(path, most=MOST_ARTIFACT_BYTES)
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: cannot be read ({err}); expected a {kind.__name__} file") from err
    return from_json(kind, text, str(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, or leave it untouched if anything fails.

    It is written beside its name as `.NAME.partial-<id>`, locked while its writer lives: what a killed one left there,
    the next one removes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{path.name}.partial-")
    handle, name = _open_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException as err:
        Path(name).unlink(missing_ok=True)
        if isinstance(err, OSError) and err.filename is None:  # a failed write does not say of what
            err.filename = str(path)
        raise


def _open_beside(path: Path) -> tuple[int, str]:
    """Return a new file beside `path`, locked; made again where another process took it for a leftover before that."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
        if lock(handle) != "taken" and os.fstat(handle).st_nlink:
            return handle, name
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def save_run_record(path: Path, *, seconds: float, device: str, argv: list[str]) -> None:
    """Write `<artifact>.run.json`: what differs from run to run, so that the artifact itself does not."""
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "argv": argv,
    }
    write_atomically(path.with_suffix(".run.json"), (json.dumps(record, indent=1) + "\n").encode())


def package_versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that numbers depend on."""
    names = ("quant-fairness", "torch", "transformers", "safetensors", "compressed-tensors", "numpy", "scipy")
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    return versions | {name: metadata.version(name) for name in names}


def digest(parts: Mapping[str, Any] | list[Any]) -> str:
    """sha256 of the canonical JSON of plain data."""
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
