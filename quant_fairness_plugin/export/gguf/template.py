"""A GGUF file of the same 16-bit model: where its metadata and tokenizer come from, and how its tensors are arranged.

llama.cpp's converter orders the rows of some tensors in its own way, architecture by architecture. Nothing of that is
listed here: a tensor is put into each arrangement that is known, and the one that comes close to the file's own values
is taken. Where none does, it is another model, or an arrangement that is not known, and nothing is written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.export.gguf.blocks import dense_values

MOST_DISTANCE = 0.5
"""Of values to those of the file, as a share of the latter. It lies between what rounding a tensor to 4 bits does,
twice and each time anew, and the square root of 2 of tensors of one size that have nothing to do with each other."""
MOST_ROWS = 512
"""Rows that are compared, evenly spread."""
ONLY_IN_GGUF = ("rope_freqs.weight",)
"""Tensors that the converter computes from the config; they are copied."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How the rows of a tensor stand in a GGUF file."""

    heads: int = 0
    """0: as in the checkpoint. Else the two halves of each of so many heads are interleaved, as llama.cpp's rotary
    embedding wants them (`LlamaModel.permute` of its converter)."""
    transposed: bool = False
    """Whether the checkpoint holds it `[columns, rows]` (GPT-2)."""
    offset: float = 0.0
    """What the converter adds: 1 to Gemma's norms."""

    def order(self, rows: int) -> Tensor:
        """Return which row of the checkpoint stands in each place, int64 `[rows]`."""
        order = torch.arange(rows)
        return order.view(self.heads, 2, -1).transpose(1, 2).reshape(-1) if self.heads else order

    def arranged(self, tensor: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return a tensor of the checkpoint as it stands in the file; with `rows`, those places of it."""
        turned = tensor.T if self.transposed else tensor
        if self.heads or rows is not None:
            order = self.order(len(turned))
            turned = turned[order if rows is None else order[rows]]
        return turned.float() + self.offset if self.offset else turned  # 16 bit would round the sum


class Template:
    """A GGUF file, opened."""

    def __init__(self, path: Path) -> None:
        """Open a file; tensors are read when they are asked for.

        Raises:
            ArtifactError: no GGUF file, or a damaged one.
            UnsupportedModelError: an architecture that the package gguf does not know.
        """
        import gguf

        if not path.is_file():
            raise ArtifactError(f"{path} is not a file; expected a GGUF file of the same model. Correct --like")
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            name = str(self._field("general.architecture"))
            self.architecture = name
            self.layers = int(self._field(f"{name}.block_count"))
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error, OSError) as err:
            raise ArtifactError(
                f"{path}: is no GGUF file that can be read ({' '.join(str(err).split())[:120]}). Get it again, or "
                "convert the model again"
            ) from err
        known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
        if name not in known:
            raise UnsupportedModelError(
                f"{path}: the package gguf {gguf_version()} does not know the architecture {name!r}; a later one may"
            )
        if self.reader.get_field("split.count") is not None:
            raise ArtifactError(
                f"{path}: is one part of several; give the whole, which llama-gguf-split --merge makes of them"
            )
        self.alignment = int(self.reader.alignment)
        self._names = gguf.get_tensor_name_map(known[name], self.layers)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def all_f32(self) -> bool:
        """Whether every matrix is in float32, so that the types say nothing."""
        return all(tensor.tensor_type.name == "F32" for tensor in self.tensors.values())

    def _field(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise KeyError(f"it has no {key}")
        return field.contents()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, rows first, as PyTorch has it."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def name_of(self, stored: str) -> str | None:
        """Return what a GGUF file calls a tensor of the checkpoint; None where the architecture has none."""
        found: str | None = self._names.get_name(stored, try_suffixes=(".weight", ".bias"))
        return found

    def fields(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Yield the metadata: key, value, its type, and that of its elements where it is an array."""
        import gguf

        for field in self.reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                kind = field.types[0]
                yield field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None

    def arrangement(self, name: str, tensor: Tensor) -> Arrangement:
        """Return how the tensor of a checkpoint stands in the file: the arrangement that comes closest to its values.

        Args:
            name: of the tensor in the file.
            tensor: of the checkpoint, dequantized, in any floating-point dtype.

        Raises:
            ArtifactError: none comes close.
        """
        entry, shape = self.tensors[name], self.shape(name)
        rows = torch.linspace(0, shape[0] - 1, min(MOST_ROWS, shape[0])).long()
        data = entry.data[rows.numpy()] if len(shape) > 1 else entry.data
        given = dense_values(data, entry.tensor_type.name)
        given = given.view(len(rows), *shape[1:]) if len(shape) > 1 else given[rows]
        distances = {
            candidate: _distance(given, candidate.arranged(tensor, rows).float())
            for candidate in self._candidates(shape, tensor)
        }
        if not distances:
            raise ArtifactError(
                f"{self.path}: {name} has the shape {list(shape)}, in the checkpoint {list(tensor.shape)}; it is a "
                "file of another model. Give one of the checkpoint's own with --like"
            )
        nearest = min(distances, key=distances.__getitem__)
        if not distances[nearest] <= MOST_DISTANCE:  # also of NaN
            raise ArtifactError(
                f"{self.path}: {name} is {distances[nearest]:.2f} of its size away from the checkpoint's values in any "
                f"order that is known, at most {MOST_DISTANCE} is expected: it is a file of another model, or its "
                "converter orders rows in a way that is not known here"
            )
        return nearest

    def _candidates(self, shape: tuple[int, ...], tensor: Tensor) -> Iterator[Arrangement]:
        transposed = tuple(reversed(shape))
        for turned in (False, True):
            if tensor.shape != (transposed if turned else shape) or (turned and tensor.ndim < 2):
                continue
            yield Arrangement(transposed=turned)
            for heads in self._heads():
                if shape[0] % (2 * heads) == 0:
                    yield Arrangement(heads=heads, transposed=turned)
        if tensor.ndim == 1 and tensor.shape == shape:
            yield Arrangement(offset=1.0)

    def _heads(self) -> list[int]:
        """Return the numbers of heads that the file names, of queries and of keys."""
        found: dict[int, None] = {}
        for key in ("head_count", "head_count_kv"):
            field = self.reader.get_field(f"{self.architecture}.attention.{key}")
            value = None if field is None else field.contents()
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int) and count > 0:
                    found[count] = None
        return list(found)


def gguf_version() -> str:
    """Return the version of the package gguf."""
    from importlib import metadata

    return metadata.version("gguf")


def _distance(given: Tensor, values: Tensor) -> float:
    size = float(given.norm())
    return float((given - values).norm()) / size if size > 0 else float((values != 0).any())
