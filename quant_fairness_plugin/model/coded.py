"""Weights of 8 or 4 bits with scales, read tensor by tensor as bfloat16 values; see `source_format`.

A number of 8 bits times its scale has more binary digits than the 8 that bfloat16 holds, so each value is rounded, by
at most one part in 256. A server that multiplies in FP8 does not do that, and rounds activations instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.reading import Place, places_of_file, read_parts, read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.source_format import (
    BLOCK_SCALES,
    BLOCKS,
    SourceFormat,
    read_as,
    scale_of,
    unpacked_shape,
)
from quant_fairness_plugin.model.weights import read_shapes

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive values of a 4-bit float; the highest bit is the sign."""
_EXPONENT_OFFSET = 127
"""What is added to the exponent of a scale before it is stored as a byte."""


def find_tensors(files: ModelFiles) -> dict[str, Place]:
    """Return where every tensor of a checkpoint is, from the headers of its files alone.

    Weights of 8 or 4 bits stand under their own names, as the bfloat16 tensors that reading them gives.

    Raises:
        ArtifactError: pickled weights, a malformed file, values of a type that no dense model has, or scales that do
            not fit their weight.
    """
    raw = {name: place for path in files.weights for name, place in places_of_file(path)}
    form = files.source
    if form is None:
        return raw
    return {name: _place(name, raw, form) for name in read_as(read_shapes(files.weights), form)}


def _place(name: str, raw: Mapping[str, Place], form: SourceFormat) -> Place:
    if name not in raw:
        numbers, scales = raw[name + BLOCKS], raw[name + BLOCK_SCALES]
        shape = unpacked_shape(numbers.shape)
        return Place(numbers.path, numbers.offset, torch.bfloat16, shape, Float4(numbers, scales))
    place, scale = raw[name], scale_of(name, raw)
    if place.dtype not in _FLOAT8 or scale is None:
        return place
    coding = Float8(place, raw[scale], form.block)
    if coding.kind() is None:
        raise ArtifactError(
            f"{place.path}: {scale} is {list(raw[scale].shape)}, and {name} is {list(place.shape)}; expected one "
            f"scale, one of each row, or one of each block of {form.block or 'a size that config.json says'}. Get the "
            "files again."
        )
    return Place(place.path, place.offset, torch.bfloat16, place.shape, coding)


@dataclass(frozen=True, slots=True)
class Float8:
    """A weight of FP8 numbers, `[rows, columns]` or `[experts, rows, columns]`."""

    weight: Place
    scale: Place
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None where whole rows or tensors do."""

    def kind(self) -> Literal["tensor", "row", "block"] | None:
        """Return what has a scale of its own, by the shapes; None where they do not fit."""
        *lead, rows, columns = self.weight.shape if len(self.weight.shape) > 1 else (1, *self.weight.shape)
        given = self.scale.shape
        if self.block is not None and given == (*lead, -(-rows // self.block[0]), -(-columns // self.block[1])):
            return "block"
        if prod(given) == 1:
            return "tensor"
        return "row" if given in ((*lead, rows), (*lead, rows, 1)) else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return part of the weight, along its first dimension, in bfloat16."""
        [numbers] = read_parts(self.weight, [(start, stop)])
        return (numbers.float() * self._scales(start, stop)).to(torch.bfloat16)

    def _scales(self, start: int, stop: int) -> Tensor:
        """Return the scales of a part of the weight, in a shape that multiplies it."""
        values, kind, shape = read_tensor(self.scale).float(), self.kind(), self.weight.shape
        if kind == "tensor":
            return values.reshape(())
        if kind == "row":
            return values.reshape(*shape[:-1], 1)[start:stop]
        assert self.block is not None  # the kind says so
        if len(shape) == 2:
            values = values[torch.arange(start, stop) // self.block[0]]
        else:
            values = values[start:stop][..., torch.arange(shape[-2]) // self.block[0], :]
        return values[..., torch.arange(shape[-1]) // self.block[1]]


@dataclass(frozen=True, slots=True)
class Float4:
    """A weight of 4-bit floats in groups of 32 with a power of two as scale, as gpt-oss stores its experts.

    Two numbers a byte, the lower half first: bytes `[experts, rows, groups, 16]`, exponents `[experts, rows, groups]`.
    What is read is transposed, `[experts, columns, rows]`, as the model holds it.
    """

    numbers: Place
    exponents: Place

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some experts in bfloat16, which holds every value but the rarest exponents exactly."""
        [numbers] = read_parts(self.numbers, [(start, stop)])
        [exponents] = read_parts(self.exponents, [(start, stop)])
        table = torch.tensor([*_FLOAT4, *(-value for value in _FLOAT4)])
        halves = torch.stack([numbers & 15, numbers >> 4], dim=-1).long()
        values = torch.ldexp(table[halves].flatten(-2), exponents.int()[..., None] - _EXPONENT_OFFSET)
        return values.flatten(-2).transpose(1, 2).contiguous().to(torch.bfloat16)
