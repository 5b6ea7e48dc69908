"""What the values of a checkpoint's tensors say: finite, zero points in the middle, groups in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.checkpoint.dense_modules import WORD_BITS
from quant_fairness_plugin.checkpoint.folder import weight_files
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.model.reading import places_of_file, read_tensor
from quant_fairness_plugin.model.storage import all_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorValues:
    """What the values of one tensor say."""

    name: str
    where: str
    finite: bool
    symmetric: bool = True
    """False of zero points that are not all the middle of their range."""
    wrapped: bool = False
    """Whether a zero point of 0 is stored as the largest integer."""
    groups: Tensor | None = None
    """The group of every input channel, of a tensor that holds these."""


def read_values(folder: Path, form: Format, widths: Mapping[str, int]) -> Iterator[TensorValues]:
    """Look at every value once, one tensor in memory at a time.

    Args:
        folder: a checkpoint.
        form: how its quantized modules are stored.
        widths: the bits of each quantized module.
    """
    for path in weight_files(folder):
        for name, place in places_of_file(path):
            tensor = read_tensor(place)
            module, _, suffix = name.rpartition(".")
            finite = not tensor.is_floating_point() or all_finite(tensor)
            zeros = tensor if suffix == form.zeros and module in widths else None
            symmetric, wrapped = (True, False) if zeros is None else _zero_points(zeros, widths[module], form)
            yield TensorValues(
                name=name,
                where=f"{path}: {name}",
                finite=finite,
                symmetric=symmetric,
                wrapped=wrapped,
                groups=tensor if suffix == form.order and module in widths else None,
            )


def _zero_points(words: Tensor, bits: int, form: Format) -> tuple[bool, bool]:
    """Whether all packed zero points are the middle, and whether one of 0 wrapped around to the largest integer."""
    fields = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, WORD_BITS, bits)])
    middle = bool((fields == 2 ** (bits - 1) - form.zero_offset).all())
    return middle, form.zero_offset > 0 and bool((fields == 2**bits - form.zero_offset).any())
