"""Step 7, `compressed-tensors` pack-quantized: the most portable partially quantized format, and the default.

`ignore` is the only list of this format. Loaders match it exactly (vLLM and Transformers; vLLM after expanding a merged
name into its parts) or as a substring (SGLang), so every entry is the full name of one unmerged module. No key beyond
the format's own is written: the package announces that it will refuse unknown ones.

Modules of 8 bits have a group of their own whose targets are their full names: readers let an exact name (vLLM: or the
exact names of all parts of a merged module) win over the class name `Linear` of the other group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_fairness_kernels.packing import CompressedTensors, pack_compressed_tensors, unpack_compressed_tensors
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.quantize.grid import QuantizedTensor


class CompressedTensorsFormat:
    """Integers packed along the input features, scales `[rows, groups]`."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that stand for `<module>.weight`, by full name."""
        packed = pack_compressed_tensors(
            tensor.integers, tensor.scales, tensor.zeros, bits=tensor.grid.bits, symmetric=tensor.grid.symmetric
        )._asdict()
        return {f"{module}.{suffix}": value for suffix, value in packed.items() if value is not None}

    def read_back(self, module: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The module that `tensors` stored. Exact inverse."""
        stored = CompressedTensors(
            tensors[f"{module}.weight_packed"],
            tensors[f"{module}.weight_scale"],
            tensors[f"{module}.weight_shape"],
            None if grid.symmetric else tensors[f"{module}.weight_zero_point"],
        )
        integers, scales, zeros = unpack_compressed_tensors(stored, bits=grid.bits)
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        groups: dict[str, dict[str, Any]] = {}
        for number, bits in enumerate(sorted(set(modules.bits.values())), start=1):
            names = [name for name in modules.quantized if modules.bits.get(name) == bits]
            groups[f"group_{number}"] = _group(names, grid, bits)
        # Last, because compressed-tensors warns of every name that comes after a class which matched first.
        groups["group_0"] = _group(["Linear"], grid, grid.bits)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*modules.kept, *modules.aliases],
        }

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """None: everything is in `config.json`."""
        return {}


def _group(targets: list[str], grid: Grid, bits: int) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if grid.group_size == -1 else "group",
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "dynamic": False,
            "actorder": None,
        },
    }
