"""Checks of files: sizes and checksums against `quant_fairness.json`, then safetensors headers. No torch.

Each check returns one sentence about what it saw, or raises an `ArtifactError` that names the file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from quant_fairness_plugin.artifacts import ExportRecord, FileRecord, load
from quant_fairness_plugin.checkpoint.formats import FORMATS, marker_of_method
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.headers import TensorShapes
from quant_fairness_plugin.model.weights import check_inside, find_weights, read_json, read_shapes

RECORD = "quant_fairness.json"
SIDE_FILES = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ put the metadata; some of their folders have it nowhere else."""
_OWN_NAME = re.compile(r"(gptq|awq)_model[\w.-]*\.safetensors", re.ASCII)
"""How AutoGPTQ and early AutoAWQ named the weights, which no other loader finds."""
_AUTOAWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}
_AGAIN = "Copy or export the folder again."


def list_files(folder: Path) -> list[str]:
    """Relative names of the files of a checkpoint, without `quant_fairness.json` and hidden ones (`.git`, `.cache`)."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [name.as_posix() for name in names if str(name) != RECORD and not any(p.startswith(".") for p in name.parts)]


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes_=path.stat().st_size, sha256=checksum)


def load_record(folder: Path) -> ExportRecord:
    """The record of an export.

    Raises:
        ArtifactError: no folder, no record, or one that does not fit.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected a checkpoint that was exported here. Check the path.")
    if not (folder / RECORD).is_file():
        raise ArtifactError(f"{folder} has no {RECORD}, which every export of this program has. Export it again.")
    record = load(ExportRecord, folder / RECORD)
    if record.format not in FORMATS:
        raise ArtifactError(
            f"{folder / RECORD}: format {record.format!r} is unknown; known are {', '.join(FORMATS)}. Export it again."
        )
    return record


def check_recorded_files(folder: Path, record: ExportRecord) -> str:
    """Every recorded file is there, nothing else is, and sizes and checksums agree."""
    present, recorded = set(list_files(folder)), set(record.files)
    unsafe = [name for name in recorded if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise ArtifactError(f"{folder / RECORD}: names a file outside the folder: {sorted(unsafe)[0]!r}. {_AGAIN}")
    for problem, names in (("missing", recorded - present), ("not in the record", present - recorded)):
        if names:
            raise ArtifactError(
                f"{folder}: {problem}: {', '.join(sorted(names))}; expected the recorded files. {_AGAIN}"
            )
    for name, expected in record.files.items():
        size = (folder / name).stat().st_size
        if size != expected.bytes_:
            raise ArtifactError(f"{folder / name} has {size} bytes, recorded are {expected.bytes_}. {_AGAIN}")
    for name, expected in record.files.items():
        if file_record(folder / name).sha256 != expected.sha256:
            raise ArtifactError(f"{folder / name} was altered: its sha256 is not the recorded one. {_AGAIN}")
    return f"{len(record.files)} files, {sum(file.bytes_ for file in record.files.values())} bytes"


def check_headers(folder: Path) -> TensorShapes:
    """The tensors of a checkpoint by its headers, after checking that these are well formed and agree with the index.

    Returns:
        Tensor name → (dtype as safetensors writes it, shape).

    Raises:
        ArtifactError: a malformed header, a key or tensor that exists twice, stray shards, or another index.
    """
    return read_shapes(weight_files(folder))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files, also where AutoGPTQ or AutoAWQ gave the only one a name of its own.

    Raises:
        ArtifactError: no weights, or files that do not belong together.
    """
    standard = [folder / name for name in ("model.safetensors", "model.safetensors.index.json")]
    named = sorted(path for path in folder.glob("*.safetensors") if _is_own_name(folder, path))
    if any(path.is_file() for path in standard) or len(named) != 1:
        return find_weights(folder, allow_pickle=False)
    check_inside(folder, named[0])
    return (named[0],)


def _is_own_name(folder: Path, path: Path) -> bool:
    if _OWN_NAME.fullmatch(path.name):
        return True
    side = folder / SIDE_FILES[0]
    return side.is_file() and read_json(side).get("model_file_base_name") == path.stem


def packed_modules(names: Iterable[str], quantization: Mapping[str, Any]) -> set[str]:
    """The modules that a checkpoint holds quantized, judged by the names of its tensors.

    Args:
        names: of all tensors.
        quantization: the `quantization_config`; one without a known `quant_method` holds none.
    """
    suffix = marker_of_method(quantization.get("quant_method"))
    return {name.removesuffix(f".{suffix}") for name in names if suffix and name.endswith(f".{suffix}")}


def read_quantization(folder: Path) -> tuple[dict[str, Any], str]:
    """The quantization metadata and the file that holds it: `config.json`, or else a tool's own file.

    AutoAWQ's names for bits and group size in its own file are translated.

    Returns:
        The metadata, empty for a plain 16-bit checkpoint, and the file's name.

    Raises:
        ArtifactError: a file that is no JSON object.
    """
    _, quantization = read_config(folder)
    if quantization is not None:
        return quantization, "config.json"
    for name, method in zip(SIDE_FILES, ("gptq", "awq"), strict=True):
        if (folder / name).is_file():
            content = {_AUTOAWQ_KEYS.get(key, key): value for key, value in read_json(folder / name).items()}
            return {"quant_method": method} | content, name
    return {}, "config.json"


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`config.json` without its `quantization_config`, and that entry, or None for a plain 16-bit checkpoint.

    Raises:
        ArtifactError: missing, malformed, or a `quantization_config` that is no object.
    """
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        raise ArtifactError(f"{folder / 'config.json'}: quantization_config is no JSON object. {_AGAIN}")
    return config, quantization
