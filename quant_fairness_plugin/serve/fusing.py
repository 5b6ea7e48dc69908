"""Fuse modules that get the same input in one launch: q, k and v, or gate and up. Small matrices leave a GPU idle.

The features of the modules are stored one after the other, and each module hands out its own slice. The first of them
that is called computes all; the others, called with the very same tensor, find theirs ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from quant_fairness_kernels.int4_matmul import Columns
from quant_fairness_kernels.nibble_planes import NibblePlanes, concatenate_planes
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.serve.linear import QuantizedLinear, put_module


@dataclass(frozen=True, slots=True)
class Prepared:
    """One quantized module, read and not yet in the model."""

    planes: NibblePlanes
    bias: Tensor | None
    columns: Columns | None

    def linear(self, *, dtype: torch.dtype, on_cpu: bool) -> QuantizedLinear:
        """The module that computes it."""
        return QuantizedLinear(self.planes, bias=self.bias, dtype=dtype, on_cpu=on_cpu, columns=self.columns)


class SharedLaunch(nn.Module):
    """Several modules of one input as one; keeps the outputs that were not asked for yet, and nothing else."""

    def __init__(self, linear: QuantizedLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, tuple(sizes)
        self._input: Tensor | None = None
        self._input_version: int | None = None
        self._ready: list[Tensor | None] = [None] * len(sizes)

    def part(self, index: int, x: Tensor) -> Tensor:
        """The output of one module, `[..., sizes[index]]`, a view into that of all; each may be had once per input."""
        version = None if x.is_inference() else x._version
        ready = self._ready[index]
        if ready is None or x is not self._input or version != self._input_version:
            self._input, self._input_version = x, version
            self._ready = list(self.linear(x).split(self.sizes, dim=-1))
            ready = self._ready[index]
            assert ready is not None  # just computed
        self._ready[index] = None
        if all(output is None for output in self._ready):
            self._input = None
        return ready


class FusedPart(nn.Module):
    """One of the modules of a shared launch, in the place of its own linear module."""

    def __init__(self, shared: SharedLaunch, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.in_features, self.out_features = shared.linear.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`; not contiguous."""
        return self.shared.part(self.index, x)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, part {self.index + 1} of {len(self.shared.sizes)}"


def launches(model: nn.Module, names: Iterable[str], *, fuse: bool) -> list[tuple[str, ...]]:
    """Quantized modules by what could be computed together, in the order of their first ones.

    Args:
        model: the unquantized architecture, on any device.
        names: of its quantized modules.
        fuse: whether modules are to be computed together at all.
    """
    group_of: dict[str, tuple[str, ...]] = {}
    wanted = list(names)
    for group in _groups(model) if fuse else ():
        members = tuple(name for name in group if name in wanted)
        if len(members) > 1:
            group_of |= dict.fromkeys(members, members)
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in wanted))


def reason_against_fusing(parts: Sequence[Prepared]) -> str | None:
    """Why modules that get the same input cannot share a launch, as a clause; None if they can."""
    first = parts[0]
    if any(not _equal(part.planes.permutation, first.planes.permutation) for part in parts):
        return "their act-order permutations differ"
    sizes = {(part.planes.K, part.planes.groups, part.planes.dtype) for part in parts}
    if len(sizes) > 1:
        return f"their input channels, groups and types differ: {sorted(map(str, sizes))}"
    indices = [None if part.columns is None else part.columns.index for part in parts]
    if any(not _equal(index, indices[0]) for index in indices):
        return "they keep different input channels in 16 bit"
    return None


def put_fused(model: nn.Module, parts: Mapping[str, Prepared], *, dtype: torch.dtype, on_cpu: bool) -> None:
    """Put modules that `reason_against_fusing` has nothing against in the place of their own, as one launch."""
    ready = list(parts.values())
    sizes = [part.planes.N for part in ready]
    together = Prepared(concatenate_planes([part.planes for part in ready]), _bias(ready), _columns(ready))
    shared = SharedLaunch(together.linear(dtype=dtype, on_cpu=on_cpu), sizes)
    for index, name in enumerate(parts):
        put_module(model, name, FusedPart(shared, index))


def _groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Full names of the modules of each fusion group; none of an unknown architecture."""
    try:
        family = detect_family(model)  # type: ignore[arg-type] # a PreTrainedModel, which mypy sees as a module
    except UnsupportedModelError:
        return []
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    if family.generic:
        return []
    return [
        tuple(f"{family.blocks}.{layer}.{name}" for name in unit.modules)
        for layer in range(len(blocks))
        for unit in family.units_of(layer)
    ]


def _bias(parts: Sequence[Prepared]) -> Tensor | None:
    if all(part.bias is None for part in parts):
        return None
    return torch.cat([torch.zeros(part.planes.N) if part.bias is None else part.bias.float() for part in parts])


def _columns(parts: Sequence[Prepared]) -> Columns | None:
    columns = [part.columns for part in parts if part.columns is not None]
    return Columns(columns[0].index, torch.cat([part.weights for part in columns], dim=1)) if columns else None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
