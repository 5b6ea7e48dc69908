"""`compressed-tensors` pack-quantized: the most portable partially quantized format, and the default.

`ignore` is the only list of this format. Loaders match it exactly (vLLM and Transformers; vLLM after expanding a merged
name into its parts) or as a substring (SGLang), so every entry is the full name of one unmerged module. Of a model that
also sees or hears, each part that is not text has one regular expression, and names that differ in files and in memory
are written both ways: Transformers looks for the one, servers for the other. No key beyond the format's own is written:
the package announces that it will refuse unknown ones.

Modules of other bits or another group size have groups of their own whose targets are their full names: readers let an
exact name (vLLM: or the exact names of all parts of a merged module) win over the class name `Linear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.format import (
    Format,
    Quantization,
    Shape,
    StoredGrid,
    TensorKind,
    wrong_fields,
    wrong_names,
)
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor

WIDE_BITS = 8
"""The other width, of modules that a group names."""
GROUP_SIZES = (32, 64, 128)


class CompressedTensorsFormat(Format):
    """Integers packed along the input features, scales `[rows, groups]`."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    layouts = ("compressed-tensors",)
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    optional = frozenset({"weight_zero_point", "weight_g_idx"})
    zeros = "weight_zero_point"
    order = "weight_g_idx"

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that can stand for a module of these sizes."""
        return {
            "weight_packed": ("I32", (grid.rows, grid.words(grid.cols))),
            "weight_scale": (None, (grid.rows, grid.groups)),
            "weight_shape": ("I64", (2,)),
            "weight_zero_point": ("I32", (grid.words(grid.rows), grid.groups)),
            "weight_g_idx": ("I32", (grid.cols,)),
        }

    def written(self, *, symmetric: bool) -> tuple[str, ...]:
        """Return the suffixes of a module; a symmetric grid stores no zero points."""
        return self.suffixes[:3] if symmetric else self.suffixes

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows and columns, which a tensor of their own holds."""
        rows, cols = (int(size) for size in parts["weight_shape"])
        return rows, cols

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        """Return the words of a row, its integers, and the number of groups."""
        return shapes["weight_packed"][-1], cols, shapes["weight_scale"][-1]

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        from quant_fairness_kernels.packing import pack_compressed_tensors  # torch

        packed = pack_compressed_tensors(
            tensor.integers, tensor.scales, tensor.zeros, bits=tensor.grid.bits, symmetric=tensor.grid.symmetric
        )._asdict()
        return {suffix: value for suffix, value in packed.items() if value is not None}

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `pack` stored. Exact inverse."""
        from quant_fairness_kernels.packing import CompressedTensors, unpack_compressed_tensors  # torch

        from quant_fairness_plugin.quantize.grid import QuantizedTensor  # torch

        stored = CompressedTensors(
            parts["weight_packed"], parts["weight_scale"], parts["weight_shape"], parts.get("weight_zero_point")
        )
        integers, scales, zeros = unpack_compressed_tensors(stored, bits=grid.bits)
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return the `quantization_config` entry of `config.json`."""
        groups: dict[str, dict[str, Any]] = {}
        grids = {
            name: replace(
                grid, bits=modules.bits.get(name, grid.bits), group_size=modules.sizes.get(name, grid.group_size)
            )
            for name in modules.quantized
        }
        others = sorted(set(grids.values()) - {grid}, key=lambda other: (other.bits, other.group_size))
        for number, other in enumerate(others, start=1):
            names = [name for name, own in grids.items() if own == other]
            names += [modules.renamed[name] for name in names if name in modules.renamed]
            groups[f"group_{number}"] = integer_group(names, other)
        if modules.experts is not None and groups:
            # Transformers gives experts the first group whose pattern names them, else the first without a pattern.
            pattern = re.compile(modules.experts.removeprefix("re:"))
            own = next((own for name, own in grids.items() if pattern.match(name)), grid)
            groups = {"experts": integer_group([modules.experts], own)} | groups
        # Last, because compressed-tensors warns of every name that comes after a class which matched first.
        groups["group_0"] = integer_group(["Linear"], grid)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(modules.left_out),
        }

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong: the groups, the names of targets, or the names to ignore."""
        expected = {"quant_method": self.method, "format": "pack-quantized", "quantization_status": "compressed"}
        yield from wrong_fields(quantization, expected)
        yield from _wrong_groups(modules, quantization.get("config_groups"))
        if modules.experts is not None:
            yield from _wrong_experts(quantization.get("config_groups"))
        yield from wrong_ignore(modules, quantization)


def integer_group(targets: list[str], grid: Grid) -> dict[str, Any]:
    """Return an entry of `config_groups` for modules of integers."""
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if grid.group_size == -1 else "group",
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "dynamic": False,
            "actorder": None,
        },
    }


def _wrong_groups(modules: ModuleMap, groups: object) -> Iterator[str]:
    """One group of int4 weights for all linear modules, and before it groups for named ones, each of another scheme."""
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        yield f"config_groups is {groups!r}; expected: a table of groups"
        return
    *others, last = (group for group in groups.values() if group.get("targets") != [modules.experts])
    yield from wrong_fields(last, {"targets": ["Linear"]})
    schemes = [_scheme(group) for group in (*others, last)]
    if len(set(schemes)) < len(schemes) or any("Linear" in group.get("targets", []) for group in others):
        yield (
            f"config_groups holds {1 + len(others)} groups; expected: one for the names of each other scheme, and "
            "after them one for Linear"
        )
    yield from wrong_integer_group(last, STORED_BITS)
    for group in others:
        yield from wrong_integer_group(group, WIDE_BITS if _scheme(group)[0] == WIDE_BITS else STORED_BITS)
    for group in others:
        # Another target would match nothing, and no reader would say so.
        known = {"Linear", *modules.quantized, *(modules.renamed.get(name, name) for name in modules.quantized)}
        for name in set(group.get("targets", ())) - known:
            yield f"targets hold {name!r}, which is no quantized module; expected: full names of unmerged modules"


def _scheme(group: Mapping[str, Any]) -> tuple[object, object]:
    """Return bits and group size; None where all of a row shares a scale."""
    weights = group.get("weights") or {}
    return weights.get("num_bits"), weights.get("group_size")


def _wrong_experts(groups: object) -> Iterator[str]:
    """All experts of a checkpoint have one group: the first with a pattern that names them, else without a pattern."""
    tables = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    patterns = [[target.startswith("re:") for target in group.get("targets", ())] for group in tables]
    named = [g for g in tables if any(t.startswith("re:") and "experts" in t for t in g.get("targets", ()))]
    plain = [group for group, matches in zip(tables, patterns, strict=True) if not all(matches)]
    for group in [*named, *plain][:1]:
        yield from wrong_integer_group(group, STORED_BITS)


def wrong_integer_group(group: Mapping[str, Any], bits: int) -> Iterator[str]:
    """Yield what is wrong in a group of compressed integers: weights only; in order, as servers read no act-order."""
    yield from wrong_fields(group, {"format": "pack-quantized", "input_activations": None, "output_activations": None})
    weights = group.get("weights") or {}
    yield from wrong_fields(weights, {"num_bits": bits, "type": "int", "dynamic": False})
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if (strategy, size) != ("channel", None) and (strategy != "group" or size not in GROUP_SIZES):
        yield (
            f"strategy is {strategy!r} with group_size {size!r}; expected: group of 32, 64 or 128, or channel without"
        )
    order = weights.get("actorder")
    if order not in (None, "static"):  # `static` changes nothing at run time
        yield f"actorder is {order!r}; expected: null or 'static'"


def wrong_ignore(modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
    """Yield every entry that is not the full name of a linear module or the pattern of a part that is not text."""
    malformed = list(wrong_names(quantization, "ignore"))
    yield from malformed
    if malformed:
        return
    listed = quantization["ignore"]
    known = {*modules.kept, *modules.aliases, *modules.quantized, *modules.routed}
    known |= {f"re:{pattern}" for pattern in modules.patterns}
    for entry in listed:
        if entry not in known:
            yield f"ignore holds {entry!r}, which is no linear module; expected: full names of unmerged modules"
    for name in sorted(set(modules.left_out).difference(modules.kept, listed)):
        yield f"ignore lacks {name}, another name of a 16-bit module; expected: every name of the 16-bit modules"
