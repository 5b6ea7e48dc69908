"""`compressed-tensors` of float codes: FP8 (`float-quantized`), NVFP4 and MXFP4 (`…-pack-quantized`), weights only.

What is stored is what compressed-tensors 0.19 stores under these names: two FP4 codes to a byte, the low half first;
NVFP4's scales as they are and one divisor for a matrix; MXFP4's scales as exponents over 127; FP8 codes as they are.
All quantized modules of a checkpoint have one scheme, and the others are in `ignore`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.compressed_tensors import wrong_ignore
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
        group = {
            "targets": ["Linear"],
            "format": self.layout_name,
            "input_activations": None,
            "output_activations": None,
            "weights": self._weights(),
        }
        return {
            "quant_method": self.method,
            "format": self.layout_name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(modules.left_out),
        }

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong: the one group, or the names to ignore."""
        expected = {"quant_method": self.method, "format": self.layout_name, "quantization_status": "compressed"}
        yield from wrong_fields(quantization, expected)
        groups = quantization.get("config_groups")
        tables = list(groups.values()) if isinstance(groups, dict) else []
        if len(tables) != 1 or not isinstance(tables[0], dict):
            yield f"config_groups is {groups!r}; expected: one group, for Linear"
            return
        [group] = tables
        given = {"targets": ["Linear"], "format": self.layout_name}
        yield from wrong_fields(group, given | {"input_activations": None, "output_activations": None})
        yield from wrong_fields(group.get("weights") or {}, self._weights())
        yield from wrong_ignore(modules, quantization)

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
