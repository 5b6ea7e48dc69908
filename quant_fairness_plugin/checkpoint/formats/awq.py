"""Step 7, `awq` version gemm, for vLLM, SGLang, gptqmodel and Transformers.

Integers are packed along the output features in an order of their own, zero points the same way and as they are (no
minus one). Readers expect them, so a symmetric grid stores its zero points (8) too. 4 bit only.

Which modules are quantized is written for every reader's rule:

- Transformers: `modules_to_not_convert` as regular expressions at the beginning of a name, or as suffixes; it would
  convert every linear module of the model, so those outside the blocks are listed as well;
- vLLM: the same list as substrings of a merged name or of its parts;
- SGLang: the same list as substrings of the merged name alone, so merged names are listed too;
- gptqmodel: only `dynamic`, with `re.match`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant_fairness_kernels.packing import AwqTensors, pack_awq, unpack_awq
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.gptq import check_word_sizes, skip_rules
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.grid import QuantizedTensor


class AwqFormat:
    """Integers `[cols, rows / 8]` packed along the output features, scales and zero points `[groups, rows]`."""

    name = "awq"
    suffixes = AwqTensors._fields

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that stand for `<module>.weight`, by full name.

        Raises:
            UnsupportedModelError: not 4 bits, or a width or height that is not a multiple of 8.
        """
        if tensor.grid.bits != 4:
            raise UnsupportedModelError(
                f"{module} has {tensor.grid.bits} bits; awq checkpoints hold 4 only. Use --format compressed-tensors."
            )
        check_word_sizes(self.name, module, tensor)
        packed = pack_awq(tensor.integers, tensor.scales, tensor.zeros)._asdict()
        return {f"{module}.{suffix}": value for suffix, value in packed.items()}

    def read_back(self, module: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The module that `tensors` stored. Exact inverse."""
        integers, scales, zeros = unpack_awq(AwqTensors(*(tensors[f"{module}.{field}"] for field in self.suffixes)))
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        return {
            "quant_method": "awq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "checkpoint_format": "gemm",
            "sym": False,
            "desc_act": False,
            "lm_head": False,
            "modules_to_not_convert": [*modules.kept, *modules.aliases, *modules.kept_fused],
            "dynamic": {rule: {} for rule in skip_rules(modules)},
        }

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """`quantize_config.json`, which older loaders read instead of `config.json`."""
        return {"quantize_config.json": self.quantization_config(modules, grid)}
