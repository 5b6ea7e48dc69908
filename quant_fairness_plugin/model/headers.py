"""Safetensors headers: names, dtypes and shapes of a file's tensors, read without torch and without its data.

Stricter than the safetensors library: it also refuses a name that is listed twice, and headers beyond any model's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from quant_fairness_plugin.documents import parse_json
from quant_fairness_plugin.errors import ArtifactError

TensorShapes = dict[str, tuple[str, tuple[int, ...]]]

MAX_HEADER_BYTES = 25_000_000
"""A quarter of what the library allows, and room for 200,000 tensors: decoded, JSON takes many times its bytes."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


def read_header(path: Path) -> TensorShapes:
    """Return names, dtypes and shapes of the tensors in a safetensors file, in the order of their data.

    Raises:
        ArtifactError: the file is missing, or is not a safetensors file: truncated, an oversized or malformed
            header, a name listed twice, an unknown dtype, or offsets that overlap, leave holes or miss the file's end.
    """
    raw, data_bytes = _raw_header(path)
    try:
        header = parse_json(raw.decode("utf-8"))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        _check_metadata(header.pop("__metadata__", {}))
        spans = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda span: span[:2])
        _check_coverage(spans, data_bytes)
    except ValueError as err:
        raise _malformed(path, str(err)) from err
    return {name: (dtype, shape) for _, _, name, dtype, shape in spans}


def _raw_header(path: Path) -> tuple[bytes, int]:
    """Return the header's bytes, and how many bytes of tensor data follow it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _malformed(path, f"a header of {length} bytes in a file of {size} bytes")
            return file.read(length), size - 8 - length
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror}). Get the file again.") from err


def _malformed(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path}: not a well-formed safetensors file ({what}). Get the file again from its source.")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts")


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """Return one tensor as (begin, end, name, dtype, shape), checked by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has a shape or offsets that are not lists of sizes")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name!r} of shape {shape} and dtype {dtype} does not take {end - begin} bytes")
    return begin, end, name, dtype, tuple(shape)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_coverage(spans: list[tuple[int, int, str, str, tuple[int, ...]]], data_bytes: int) -> None:
    position = 0
    for begin, end, name, _, _ in spans:
        if begin != position:
            raise ValueError(f"{name!r} begins at byte {begin}, where the data before it ends at {position}")
        position = end
    if position != data_bytes:
        raise ValueError(f"the tensors take {position} bytes, the file holds {data_bytes}")
