"""`compressed-tensors` of float codes: FP8 (`float-quantized`), NVFP4 and MXFP4 (`…-pack-quantized`), weights only.

What is stored is what compressed-tensors 0.19 stores under these names: two FP4 codes to a byte, the low half first;
NVFP4's scales as they are and one divisor for a matrix; MXFP4's scales as exponents over 127; FP8 codes as they are.
Beside floats of 4 bits there may be modules of INT8: each has a group with a `format` of its own, and then that of the
whole is `mixed-precision`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.compressed_tensors import (
    WIDE_BITS,
    CompressedTensorsFormat,
    integer_group,
    wrong_ignore,
    wrong_integer_group,
)
from quant_fairness_plugin.checkpoint.formats.format import (
    Format,
    Quantization,
    Shape,
    StoredGrid,
    TensorKind,
    wrong_fields,
)
from quant_fairness_plugin.quantize.schemes import SCHEMES, FloatScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor


MIXED = "mixed-precision"
"""`format` of a checkpoint whose groups have several."""
_INTEGERS = CompressedTensorsFormat()


class CompressedFloats(Format):
    """Float codes along the input features, scales `[rows, groups]`, no zero points."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    layouts = ("compressed-tensors",)
    scheme: ClassVar[FloatScheme]
    layout_name: ClassVar[str]
    """`format` in the metadata."""
    strategy: ClassVar[str]
    scale_dtype: ClassVar[str | None]
    """As the metadata writes it; None: that of the model."""

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return the `quantization_config` entry of `config.json`."""
        groups = {}
        sizes = {name: modules.sizes.get(name, Grid().group_size) for name in self._integers(modules)}
        for number, size in enumerate(sorted(set(sizes.values())), start=1):
            names = [name for name, own in sizes.items() if own == size]
            names += [modules.renamed[name] for name in names if name in modules.renamed]
            groups[f"group_{number}"] = integer_group(names, Grid(bits=WIDE_BITS, group_size=size))
        groups["group_0"] = {
            "targets": ["Linear"],
            "format": self.layout_name,
            "input_activations": None,
            "output_activations": None,
            "weights": self._weights(),
        }
        return {
            "quant_method": self.method,
            "format": self.layout_name if len(groups) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(modules.left_out),
        }

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong: the groups, the names of targets, or the names to ignore."""
        groups = quantization.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            yield f"config_groups is {groups!r}; expected: a table of groups"
            return
        *others, last = groups.values()
        expected = {"quant_method": self.method, "quantization_status": "compressed"}
        yield from wrong_fields(quantization, expected | {"format": MIXED if others else self.layout_name})
        given = {"targets": ["Linear"], "format": self.layout_name}
        yield from wrong_fields(last, given | {"input_activations": None, "output_activations": None})
        yield from wrong_fields(last.get("weights") or {}, self._weights())
        integers = self._integers(modules)
        for group in others:
            yield from wrong_integer_group(group, WIDE_BITS)
            known = {*integers, *(modules.renamed.get(name, name) for name in integers)}
            for name in set(group.get("targets", ())) - known:
                yield f"targets hold {name!r}, which is no module of {WIDE_BITS} bits; expected: full names of these"
        yield from wrong_ignore(modules, quantization)

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for `<module>.weight`, by full name; integers as their own format has them."""
        if tensor.grid.scheme != self.scheme.name:
            return _INTEGERS.tensors(module, tensor)
        return super().tensors(module, tensor)

    def expected(self, grid: StoredGrid, *, symmetric: bool) -> dict[str, TensorKind]:
        """Return the tensors of a module as they are written: suffix → dtype and shape."""
        if grid.bits != self.scheme.bits:
            return _INTEGERS.expected(grid, symmetric=symmetric)
        return super().expected(grid, symmetric=symmetric)

    def _integers(self, modules: ModuleMap) -> tuple[str, ...]:
        """Return the quantized modules that hold integers of 8 bits, which there are beside floats of 4 alone."""
        return () if self.scheme.bits == WIDE_BITS else tuple(modules.bits)

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        """Return the words that the codes of a row would fill, their number, and the number of groups."""
        grid = StoredGrid(rows, cols, self.scheme.bits, shapes["weight_scale"][-1])
        return grid.words(cols), cols, grid.groups

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `pack` stored. Exact inverse."""
        import torch

        from quant_fairness_plugin.quantize.grid import QuantizedTensor  # torch

        codes, scales = self._codes(parts), self._scales(parts)
        return QuantizedTensor(
            integers=codes,
            scales=scales,
            zeros=torch.zeros(scales.shape, dtype=torch.uint8),
            grid=grid,
            divisor=parts.get("weight_global_scale"),
        )

    def _weights(self) -> dict[str, Any]:
        size = self.scheme.group_size
        return {
            "num_bits": self.scheme.bits,
            "type": "float",
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": None if size == -1 else size,
            "dynamic": False,
            "actorder": None,
            "scale_dtype": self.scale_dtype,
        }

    @abstractmethod
    def _codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the codes of a module, uint8 `[rows, cols]`."""

    @abstractmethod
    def _scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the scales of a module as its grid has them, `[rows, groups]`."""


class Fp8Tensors(CompressedFloats):
    """A byte a weight."""

    scheme = SCHEMES["fp8"]
    layout_name = "float-quantized"
    strategy = "channel"
    scale_dtype = None
    suffixes = ("weight_scale", "weight")
    widths = (8,)

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that stands for a module of these sizes."""
        return {"weight_scale": (None, (grid.rows, 1)), "weight": ("F8_E4M3", (grid.rows, grid.cols))}

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows and columns of the codes."""
        rows, cols = parts["weight"].shape
        return rows, cols

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        import torch

        return {"weight_scale": tensor.scales, "weight": tensor.integers.view(torch.float8_e4m3fn)}

    def _codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        return parts["weight"].view(torch.uint8)

    def _scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight_scale"]


class Mxfp4Tensors(CompressedFloats):
    """Two weights a byte, a scale for 32."""

    scheme = SCHEMES["mxfp4"]
    layout_name = "mxfp4-pack-quantized"
    strategy = "group"
    scale_dtype = "torch.uint8"
    suffixes: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    widths = (4,)
    scale_kind: ClassVar[str] = "U8"
    """dtype of the scales as safetensors writes it."""

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that stands for a module of these sizes."""
        return {
            "weight_packed": ("U8", (grid.rows, grid.cols // 2)),
            "weight_scale": (self.scale_kind, (grid.rows, grid.groups)),
        }

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows, and columns by the bytes of a row."""
        rows, halves = parts["weight_packed"].shape
        return rows, 2 * halves

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        import torch

        packed = tensor.integers[:, ::2] | (tensor.integers[:, 1::2] << 4)
        return {"weight_packed": packed, "weight_scale": tensor.scales.view(torch.uint8)}

    def _codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        packed = parts["weight_packed"]
        return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)

    def _scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        import torch

        return parts["weight_scale"].view(torch.float8_e8m0fnu)


class Nvfp4Tensors(Mxfp4Tensors):
    """Two weights a byte, a scale for 16, and what all scales are divided by."""

    scheme = SCHEMES["nvfp4"]
    layout_name = "nvfp4-pack-quantized"
    strategy = "tensor_group"
    scale_dtype = "torch.float8_e4m3fn"
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
    scale_kind = "F8_E4M3"

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that stands for a module of these sizes."""
        return super().shapes(grid) | {"weight_global_scale": ("F32", (1,))}

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        assert tensor.divisor is not None, "`fit` gives every NVFP4 matrix one"
        # A copy each, because the modules of a group have one in memory, and no two tensors of a file may share any.
        divided = {"weight_scale": tensor.scales, "weight_global_scale": tensor.divisor.clone()}
        return super().pack(tensor) | divided

    def _scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["weight_scale"]
