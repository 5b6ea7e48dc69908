"""Turn the heads of an attention's values, and turn them back in what reads them: the model computes the same.

An orthogonal matrix T of a head's width multiplies the rows of each head of the values, Tᵀ the columns that read them.
Spread over the whole head, what a few channels carry rounds better, and no byte is added. Written from Ashkboos et al.,
"QuaRot" (arXiv 2404.00456, section 4) and Liu et al., "SpinQuant" (arXiv 2405.16406, the rotation R2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy.fft import dct
from scipy.linalg import hadamard
from torch import Tensor, nn

from quant_fairness_plugin.model.architectures import Turn
from quant_fairness_plugin.model.devices import wide_dtype
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight

_KEY_HEADS = ("num_key_value_heads", "num_attention_heads")
"""Keys of a config for the heads of the values; the first that it has counts."""


@lru_cache
def turning_matrix(width: int) -> Tensor:
    """Return the orthogonal matrix that turns a head, float64 `[width, width]`.

    All its values have the same magnitude where the width is a power of two (Hadamard's); an odd factor of the width is
    spread by a cosine transform.
    """
    even = width & -width  # the largest power of two that divides it
    odd = dct(torch.eye(width // even, dtype=torch.float64).numpy(), axis=0, norm="ortho")
    return torch.kron(torch.from_numpy(hadamard(even) / math.sqrt(even)), torch.from_numpy(odd))


@dataclass(frozen=True, slots=True)
class Turning:
    """The values of one attention and what reads them, with the width of a head."""

    values: str
    """Name of the linear module that computes the values."""
    output: str
    """Name of the one that reads them."""
    width: int
    """Channels of a head."""

    def apply(self, modules: Mapping[str, nn.Module]) -> None:
        """Turn both modules, in place.

        Args:
            modules: name → linear module, each weight in any dtype.
        """
        for name in (self.values, self.output):
            weight = linear_weight(modules[name])
            set_linear_weight(modules[name], self._turned(name, weight, turning_matrix(self.width)))
        bias = modules[self.values].bias
        if isinstance(bias, nn.Parameter):
            bias.detach().copy_(self._turned(self.values, bias.detach()[:, None], turning_matrix(self.width))[:, 0])

    def undone(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight `[rows, columns]` of one of both as it stands in a model where nothing is turned."""
        return self._turned(name, weight, turning_matrix(self.width).T)

    def _turned(self, name: str, weight: Tensor, matrix: Tensor) -> Tensor:
        if name == self.output:
            return _rows_turned(weight.T, matrix).T.contiguous()
        return _rows_turned(weight, matrix)


def _rows_turned(weight: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the rows of each head by a matrix; heads are as many rows as it has, one after the other."""
    wide = weight.to(wide_dtype(weight.device))
    heads = wide.reshape(-1, len(matrix), weight.shape[1])
    return (matrix.to(wide) @ heads).reshape(weight.shape).to(weight.dtype)


def turnings(config: Any, turns: Sequence[Turn], matrix: Callable[[str], tuple[int, int]]) -> Iterator[Turning]:
    """Yield what can be turned in a block.

    Args:
        config: of the text model.
        turns: of the block.
        matrix: returns rows and columns of a linear module of the block.
    """
    for turn in turns:
        heads = turn.heads or next((count for key in _KEY_HEADS if (count := getattr(config, key, None))), 0)
        (rows, _), (_, read) = matrix(turn.values), matrix(turn.output)
        if heads and rows % heads == 0 and read % (rows // heads) == 0:
            yield Turning(turn.values, turn.output, rows // heads)
