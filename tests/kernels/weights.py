"""Random 4-bit weights for the tests of this folder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PlainWeight(NamedTuple):
    """Integers uint8 `[N, K]`, scales `[N, G]`, zeros uint8 `[N, G]`."""

    integers: Tensor
    scales: Tensor
    zeros: Tensor


def plain_weight(
    N: int, K: int, groups: int, *, symmetric: bool = True, dtype: torch.dtype = torch.float16, seed: int = 0
) -> PlainWeight:
    generator = torch.Generator().manual_seed(seed * 7919 + N * 1000 + K)
    integers = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(N, groups, generator=generator) * 0.02 + 1e-3).to(dtype)
    zeros = torch.randint(0, 16, (N, groups), dtype=torch.uint8, generator=generator)
    return PlainWeight(integers, scales, torch.full_like(zeros, 8) if symmetric else zeros)


def shuffled_groups(K: int, groups: int, seed: int = 0) -> Tensor:
    """The group of every channel, as act-order leaves it."""
    return torch.randperm(K, generator=torch.Generator().manual_seed(seed)) // (K // groups)


def activations(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
