"""Nibble planes back to weights with torch alone: exact, on any device, for tests and for caching."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_fairness_kernels.nibble_planes import NibblePlanes, plane_integers, plane_scales


def dequantize_planes(planes: NibblePlanes, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `[N, K]`, channels in the activations' order, computed in float32 and rounded once to `dtype`."""
    scales, zeros = (tensor.to(torch.float32) for tensor in plane_scales(planes))
    group = planes.kernel_group or planes.K
    weight = plane_integers(planes).to(torch.float32)
    grouped = weight.view(planes.N, -1, group)
    grouped.sub_(zeros[:, :, None]).mul_(scales[:, :, None])
    if planes.permutation is not None:
        weight = torch.empty_like(weight).index_copy_(1, planes.permutation, weight)
    return weight.to(dtype)
