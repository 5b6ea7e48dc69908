"""Step 7, `gptq` version 1, for gptqmodel, optimum, exllama and vLLM.

Each loader decides by another list which modules are quantized, so all of them are written ("universal metadata"):

- optimum (Transformers): `modules_in_block_to_quantize`, a list of lists, matched as a *suffix*;
- vLLM: the same list as a *substring* of the parts of a merged module, or a `-:` rule of `dynamic`;
- gptqmodel and SGLang: only `dynamic`, with `re.match` on the name, which in servers is the merged one;
- others: `modules_to_not_convert`, a regular expression or a substring.

Modules of 8 bits in a 4-bit checkpoint have a `+:` rule of `dynamic`, which optimum ignores.

Full names are safe in all of these readings. A trailing dot is not: as a regular expression `layers.1.` is also the
beginning of `layers.10`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quant_fairness_kernels.packing import GptqTensors, pack_gptq, unpack_gptq
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.grid_rules import PACKED_MULTIPLE


class GptqFormat:
    """Integers packed along the input features and transposed, scales `[groups, rows]`, zero points minus one."""

    name = "gptq"
    suffixes = GptqTensors._fields

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that stand for `<module>.weight`, by full name.

        Raises:
            UnsupportedModelError: a width or height that is not a multiple of 8.
        """
        check_word_sizes(self.name, module, tensor)
        packed = pack_gptq(tensor.integers, tensor.scales, tensor.zeros, bits=tensor.grid.bits)._asdict()
        return {f"{module}.{suffix}": value for suffix, value in packed.items()}

    def read_back(self, module: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The module that `tensors` stored. Exact inverse."""
        stored = GptqTensors(*(tensors[f"{module}.{field}"] for field in self.suffixes))
        integers, scales, zeros = unpack_gptq(stored, bits=grid.bits)
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": False,
            "dynamic": {rule: {} for rule in skip_rules(modules)} | width_rules(modules),
            "modules_in_block_to_quantize": [list(modules.quantized)],
            "modules_to_not_convert": [*modules.kept_in_blocks, *modules.kept_fused],
        }

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """`quantize_config.json`, which older loaders read instead of `config.json`."""
        return {"quantize_config.json": self.quantization_config(modules, grid)}


def skip_rules(modules: ModuleMap) -> tuple[str, ...]:
    r"""The `dynamic` keys that exclude every kept module of the blocks, under its own and its merged name.

    A block that is kept whole takes one rule, `-:^model\.layers\.1\..*`; a single kept module one with its full name.
    """
    layers = modules.kept_layers
    single = [
        name
        for name in (*modules.kept_in_blocks, *modules.kept_fused)
        if not any(name.startswith(f"{layer}.") for layer in layers)
    ]
    return tuple([f"-:^{re.escape(layer)}\\..*" for layer in layers] + [f"-:^{re.escape(name)}$" for name in single])


def width_rules(modules: ModuleMap) -> dict[str, dict[str, int]]:
    r"""The `dynamic` rules of modules with other bits than the grid's, under their own and their merged name."""
    merged = {name: modules.bits[parts[0]] for name, parts in modules.fused.items() if parts[0] in modules.bits}
    return {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in (*modules.bits.items(), *merged.items())}


def check_word_sizes(format_name: str, module: str, tensor: QuantizedTensor) -> None:
    """Refuse a module whose rows or columns do not fill words of eight integers, as the format needs.

    Raises:
        UnsupportedModelError: a width or height that is not a multiple of 8.
    """
    rows, cols = tensor.integers.shape
    if rows % PACKED_MULTIPLE or cols % PACKED_MULTIPLE:
        raise UnsupportedModelError(
            f"{module} is [{rows}, {cols}]; {format_name} checkpoints need multiples of {PACKED_MULTIPLE} in both "
            "directions. Use --format compressed-tensors."
        )
