"""Reading tensors one at a time: whole ones or some of their rows, from safetensors files by their position.

Nothing is mapped into memory: what has been read is the caller's, and nothing else stays behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.headers import read_header

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""Types as safetensors names them."""
_READ_BYTES = 1 << 30
"""Linux reads at most 2 GiB at once."""


_COMPARED_VALUES = 1 << 22


class Coding(Protocol):
    """How the values of a tensor are computed from what the files hold."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return part of the tensor, along its first dimension."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is."""

    path: Path
    offset: int
    """Of its first byte in the file."""
    dtype: torch.dtype
    """Of the values that are read."""
    shape: tuple[int, ...]
    coding: Coding | None = None
    """How it is read where the file does not hold the values themselves."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a vector has one value a row."""
        return prod(self.shape[1:]) * self.dtype.itemsize


def read_tensor(place: Place) -> Tensor:
    """Return a whole tensor, as it is stored."""
    [rows] = read_parts(place, [(0, place.shape[0] if place.shape else 1)])
    return rows.view(place.shape)


def read_rows(place: Place, rows: Iterable[int]) -> Tensor:
    """Return some rows of a tensor, `[rows, …]`, as they are stored."""
    parts = list(read_parts(place, _runs(rows)))
    return torch.cat(parts) if parts else torch.empty((0, *place.shape[1:]), dtype=place.dtype)


def read_parts(place: Place, parts: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield parts of a tensor, each from one row up to another.

    Raises:
        ArtifactError: the file cannot be read, or ends too early.
    """
    if place.coding is not None:
        yield from (place.coding.rows(start, stop) for start, stop in parts)
        return
    with _opened(place.path) as file:
        for start, stop in parts:
            values = torch.empty((stop - start, *place.shape[1:]), dtype=place.dtype)
            file.seek(place.offset + start * place.row_bytes)
            _fill(file, values, place.path)
            yield values


def same_values(one: Place, other: Place) -> bool:
    """Return whether two tensors of the same shape hold the same numbers; compared piece by piece."""
    if one.shape != other.shape:
        return False
    rows = one.shape[0]
    size = max(1, _COMPARED_VALUES // max(1, one.shape[-1]))
    parts = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    pairs = zip(read_parts(one, parts), read_parts(other, parts), strict=True)
    return all(torch.equal(a.float(), b.float()) for a, b in pairs)


def places_of_file(path: Path) -> Iterator[tuple[str, Place]]:
    """Yield where every tensor of a safetensors file is, by name, in the order of their bytes.

    Raises:
        ArtifactError: a pickle, a malformed file, or values of a type that no dense model has.
    """
    if path.suffix != ".safetensors":
        raise ArtifactError(f"{path}: a pickle cannot be read tensor by tensor. Convert the model to safetensors.")
    header: Mapping[str, tuple[str, tuple[int, ...]]] = read_header(path)
    with _opened(path) as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    for name, (dtype, shape) in header.items():  # in the order of the data, without holes
        if dtype not in DTYPES:
            raise ArtifactError(
                f"{path}: {name} holds values of type {dtype}; expected {', '.join(DTYPES)}. Get the files again."
            )
        place = Place(path, offset, DTYPES[dtype], shape)
        yield name, place
        offset += prod(shape) * place.dtype.itemsize


def _runs(rows: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield consecutive rows as (first, after the last), so that each takes one read."""
    rows = list(rows)
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(rows)) if b != a + 1), len(rows)]
    return ((rows[start], rows[stop - 1] + 1) for start, stop in pairwise(cuts) if stop > start)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    try:
        with FileIO(path) as file:
            yield file
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read ({err.strerror}). Get the file again.") from err


def _fill(file: FileIO, values: Tensor, path: Path) -> None:
    view = memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # numpy's stubs again
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + _READ_BYTES])
        if not count:
            raise ArtifactError(f"{path}: ends before its tensors do. Get the file again.")
        done += count
