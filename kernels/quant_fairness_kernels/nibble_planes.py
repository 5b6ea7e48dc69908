"""The kernels' own layout of a 4-bit weight, *nibble planes*, and the exact way there and back.

Input channels are cut into blocks of 128, a block into four planes of 32. One 16-bit word holds the same row of the
four planes of one output feature: `words[32 b + r, n]`, nibble `i`, is the integer of channel `128 b + 32 i + r`,
feature `n`. So one tile of words becomes four tiles of weights without moving a single value between threads, and each
of them is multiplied with 32 consecutive channels of the activations.

The scale and the zero point of one group and feature share a 32-bit word, `scale | zero << 16`, both as bits of the
compute type; of a symmetric grid, whose zero point is 8 everywhere, two neighbouring features share it.

What does not fit is padded inside: channels to the block with integers equal to the zero point, which weigh nothing,
features to `FEATURES` with zeros. Groups whose channels are not consecutive (act-order) are made so by a permutation
of the channels, which the activations then go through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant_fairness_kernels.packing import GptqTensors, unpack_gptq

BLOCK = 128
"""Input channels in a block."""
PLANE = 32
"""Input channels in a plane, rows of words in a block."""
FEATURES = 128
"""Features are padded to a multiple of this, so that tiles of up to as many need no mask."""
COUNTERS = 1024
"""Output tiles that can share one launch with a split K: eight for each multiprocessor of the largest GPU."""
KERNEL_GROUPS = (128, 64, 32)
SYMMETRIC_ZERO = 8


@dataclass(frozen=True, slots=True)
class NibblePlanes:
    """One weight `[N, K]` in the kernels' layout; immutable but for `counters`, which every launch leaves at zero.

    The counters belong to the weight, so that a launch allocates and clears nothing. The price: the same weight must
    not be used on two CUDA streams at the same time.
    """

    words: Tensor
    """int16 `[K' / 4, N']`, K' and N' padded."""
    scales: Tensor
    """int32 `[G', N']`, or `[G', N' / 2]` if symmetric; G' groups of `kernel_group` channels."""
    permutation: Tensor | None
    """int64 `[K]`: the activation channel that belongs to each channel of the words; None for their own order."""
    counters: Tensor
    """int32 `[COUNTERS]`, zero."""
    N: int
    K: int
    groups: int
    """Groups of the original grid; 1 for one scale per feature."""
    symmetric: bool
    dtype: torch.dtype
    """float16 or bfloat16: the type of the scales, and of the activations that the weight takes."""

    @property
    def kernel_group(self) -> int:
        """Channels per stored scale: 128, 64 or 32, or 0 for one scale per feature."""
        return kernel_group(self.K, self.groups)

    def to(self, device: torch.device | str) -> NibblePlanes:
        """The same weight on another device; itself if it is there already."""
        return replace(
            self,
            words=self.words.to(device),
            scales=self.scales.to(device),
            permutation=None if self.permutation is None else self.permutation.to(device),
            counters=self.counters.to(device),
        )


def kernel_group(K: int, groups: int) -> int:
    """Channels per scale as the kernels know them: 128, 64, 32, or 0 for one scale per feature.

    Larger groups that are multiples of 32 are stored as several equal ones.

    Raises:
        ValueError: the groups do not divide K, or their size is not a multiple of 32.
    """
    if groups == 1:
        return 0
    if groups < 1 or K % groups:
        raise ValueError(f"{groups} groups do not divide K = {K}; the last group would be short")
    for size in KERNEL_GROUPS:
        if (K // groups) % size == 0:
            return size
    raise ValueError(
        f"groups of {K // groups} channels are not supported; accepted are multiples of 32, or one group per feature"
    )


def pack_planes(integers: Tensor, scales: Tensor, zeros: Tensor, *, group_index: Tensor | None = None) -> NibblePlanes:
    """Lay one weight out in nibble planes; `unpack_planes` returns exactly what went in.

    The tensors of a checkpoint come here through `packing`: `pack_planes(*unpack_compressed_tensors(tensors))`.

    Args:
        integers: uint8 `[N, K]` in 0..15.
        scales: float16 or bfloat16 `[N, G]`; activations must then have the same type.
        zeros: uint8 `[N, G]` in 0..15.
        group_index: `[K]`, the group of every channel where they are not in order (act-order); all groups of one size.

    Raises:
        ValueError: shapes that do not fit together, another type, a value outside 0..15, a group size that is neither a
            multiple of 32 nor all of K, or a `group_index` with groups of different sizes.
    """
    group = _checked_group(integers, scales, zeros)
    N, K = integers.shape
    permutation = None if group_index is None else _permutation(group_index, K, int(scales.shape[1]))
    symmetric = bool((zeros == SYMMETRIC_ZERO).all())
    rows = integers if permutation is None else integers[:, permutation.to(integers.device)]
    return NibblePlanes(
        words=_words(rows, zeros),
        scales=_scale_words(scales, zeros, K=K, group=group, symmetric=symmetric),
        permutation=permutation,
        counters=torch.zeros(COUNTERS, dtype=torch.int32, device=integers.device),
        N=N,
        K=K,
        groups=int(scales.shape[1]),
        symmetric=symmetric,
        dtype=scales.dtype,
    )


def unpack_planes(planes: NibblePlanes) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_planes`: integers uint8 `[N, K]` in their first order, scales `[N, G]`, zeros uint8 `[N, G]`."""
    integers = plane_integers(planes)
    if planes.permutation is not None:
        integers = torch.empty_like(integers).index_copy_(1, planes.permutation, integers)
    scales, zeros = plane_scales(planes)
    repeats = 1 if planes.groups == 1 else planes.K // planes.groups // planes.kernel_group
    return integers, scales[:, ::repeats].contiguous(), zeros[:, ::repeats].to(torch.uint8).contiguous()


def plane_integers(planes: NibblePlanes) -> Tensor:
    """The integers, uint8 `[N, K]`, channels in the order of the words (permuted, if there is a permutation)."""
    words = planes.words.view(-1, 1, PLANE, planes.words.shape[1]).to(torch.int32)
    shifts = 4 * torch.arange(4, device=words.device, dtype=torch.int32).view(1, 4, 1, 1)
    nibbles = ((words >> shifts) & 15).to(torch.uint8).reshape(-1, words.shape[-1])
    return nibbles[: planes.K, : planes.N].t().contiguous()


def plane_scales(planes: NibblePlanes) -> tuple[Tensor, Tensor]:
    """Scales and zero points as `[N, G']` in the compute type, one column per `kernel_group` channels."""
    halves = planes.scales.view(torch.int16).view(planes.dtype)
    if planes.symmetric:
        scales, zeros = halves, torch.full_like(halves, SYMMETRIC_ZERO)
    else:
        scales, zeros = halves[:, 0::2], halves[:, 1::2]
    stored = 1 if planes.kernel_group == 0 else planes.K // planes.kernel_group
    return scales[:stored, : planes.N].t().contiguous(), zeros[:stored, : planes.N].t().contiguous()


def planes_from_gptq(tensors: GptqTensors, *, version: int = 1) -> NibblePlanes:
    """Lay out the tensors of a `gptq` checkpoint, with or without act-order.

    Args:
        tensors: one module as stored.
        version: 1 stores every zero point minus one, 2 (`checkpoint_format: gptq_v2`) stores it as it is.

    Raises:
        ValueError: another version, or what `pack_planes` raises.
    """
    if version not in (1, 2):
        raise ValueError(f"unknown gptq checkpoint version {version}; accepted are 1 and 2")
    K, G = int(tensors.g_idx.numel()), int(tensors.scales.shape[0])
    in_order = torch.arange(K, dtype=tensors.g_idx.dtype, device=tensors.g_idx.device) // max(1, K // G)
    integers, scales, zeros = unpack_gptq(tensors._replace(g_idx=in_order))
    if version == 2:
        zeros = (zeros + 15) & 15
    return pack_planes(integers, scales, zeros, group_index=tensors.g_idx)


def concatenate_planes(parts: list[NibblePlanes]) -> NibblePlanes:
    """One weight whose features are those of `parts` one after the other: q, k and v, or gate and up, in one launch.

    Raises:
        ValueError: no parts, or parts of different K, groups, types or permutations.
    """
    if not parts:
        raise ValueError("no weights to concatenate")
    first = parts[0]
    for part in parts[1:]:
        if (part.K, part.groups, part.dtype) != (first.K, first.groups, first.dtype):
            raise ValueError(
                f"weights of K, groups and type {part.K}, {part.groups}, {part.dtype} and {first.K}, {first.groups}, "
                f"{first.dtype} cannot share a launch"
            )
        if not _same(part.permutation, first.permutation):
            raise ValueError("weights with different act-order permutations cannot share a launch")
    integers, scales, zeros = (torch.cat(tensors) for tensors in zip(*map(unpack_planes, parts), strict=True))
    return _pack_permuted(integers, scales, zeros, first.permutation)


def interleave_planes(gate: NibblePlanes, up: NibblePlanes) -> NibblePlanes:
    """One weight whose even features are the gate's and whose odd ones are up's: what `silu_mul=True` wants.

    Raises:
        ValueError: different sizes, groups, types or permutations.
    """
    if gate.N != up.N:
        raise ValueError(f"gate has {gate.N} features and up has {up.N}; they must have as many")
    both = concatenate_planes([gate, up])
    order = torch.arange(2 * gate.N, device=both.words.device).view(2, -1).t().reshape(-1)
    integers, scales, zeros = (tensor[order] for tensor in unpack_planes(both))
    return _pack_permuted(integers, scales, zeros, both.permutation)


def clear_channels(integers: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    """A copy of `integers` that weighs nothing in the channels `index`, which something else then computes.

    Args:
        integers: uint8 `[N, K]`.
        zeros: uint8 `[N, G]`, groups in channel order.
        index: channels.
    """
    size = integers.shape[1] // zeros.shape[1]
    cleared = integers.clone()
    cleared[:, index.long()] = zeros[:, index.long() // size]
    return cleared


def _pack_permuted(integers: Tensor, scales: Tensor, zeros: Tensor, permutation: Tensor | None) -> NibblePlanes:
    if permutation is None:
        return pack_planes(integers, scales, zeros)
    in_order = torch.arange(len(permutation), device=permutation.device) // (len(permutation) // scales.shape[1])
    index = torch.empty_like(permutation).index_copy_(0, permutation, in_order)
    return pack_planes(integers, scales, zeros, group_index=index)


def _checked_group(integers: Tensor, scales: Tensor, zeros: Tensor) -> int:
    if integers.dim() != 2 or scales.dim() != 2 or scales.shape != zeros.shape or scales.shape[0] != integers.shape[0]:
        raise ValueError(
            f"integers {list(integers.shape)} must be [N, K], scales {list(scales.shape)} and zeros "
            f"{list(zeros.shape)} both [N, groups]"
        )
    if not integers.numel():
        raise ValueError(f"an empty weight {list(integers.shape)} cannot be packed")
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales are {scales.dtype}; the kernels compute in float16 or bfloat16")
    for name, values in (("integers", integers), ("zeros", zeros)):
        if values.is_floating_point() or int(values.min()) < 0 or int(values.max()) > 15:
            raise ValueError(f"{name} must be whole numbers in 0..15, got {values.dtype} up to {values.max().item()}")
    return kernel_group(int(integers.shape[1]), int(scales.shape[1]))


def _permutation(group_index: Tensor, K: int, groups: int) -> Tensor | None:
    index = group_index.to(torch.int64)
    if index.shape != (K,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(f"group_index must give one of {groups} groups to each of {K} channels")
    counts = torch.bincount(index, minlength=groups)
    if K % groups or bool((counts != K // groups).any()):
        raise ValueError(f"group_index makes groups of {counts.min().item()} to {counts.max().item()} channels")
    order = torch.argsort(index, stable=True)
    return None if torch.equal(order, torch.arange(K, device=order.device)) else order


def _words(integers: Tensor, zeros: Tensor) -> Tensor:
    N, K = integers.shape
    height, width = -(-K // BLOCK) * BLOCK, -(-N // FEATURES) * FEATURES
    padded = torch.zeros(height, width, dtype=torch.int32, device=integers.device)
    padded[:K, :N] = integers.t()
    padded[K:, :N] = zeros[:, -1].to(torch.int32)
    planes = padded.view(-1, 4, PLANE, width)
    words = planes[:, 0] | planes[:, 1] << 4 | planes[:, 2] << 8 | planes[:, 3] << 12
    return words.to(torch.int16).reshape(-1, width)


def _scale_words(scales: Tensor, zeros: Tensor, *, K: int, group: int, symmetric: bool) -> Tensor:
    N, G = scales.shape
    repeats = 1 if group == 0 else K // G // group
    stored = 1 if group == 0 else -(-K // BLOCK) * (BLOCK // group)
    width = -(-N // FEATURES) * FEATURES
    halves = torch.zeros(stored, width, 1 if symmetric else 2, dtype=scales.dtype, device=scales.device)
    halves[: G * repeats, :N, 0] = scales.t().repeat_interleave(repeats, 0)
    if not symmetric:
        halves[: G * repeats, :N, 1] = zeros.t().repeat_interleave(repeats, 0).to(scales.dtype)
        halves[G * repeats :, :N, 1] = zeros[:, -1].to(scales.dtype)
    return halves.view(torch.int16).view(stored, -1).view(torch.int32)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
