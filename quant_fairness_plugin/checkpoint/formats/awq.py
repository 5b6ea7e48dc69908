"""`awq` version gemm, for vLLM, SGLang, gptqmodel and Transformers.

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

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.format import (
    MERGED_NAMES,
    MIXTURES,
    SINGLE_UNITS,
    TEXT_ONLY,
    WIDTHS,
    Format,
    Quantization,
    Shape,
    StoredGrid,
    TensorKind,
    wrong_fields,
)
from quant_fairness_plugin.checkpoint.formats.gptq import (
    check_whole_words,
    skip_rules,
    wrong_group_size,
    wrong_rules,
    wrong_skip_list,
)
from quant_fairness_plugin.checkpoint.module_map import activation_scales
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS, Refusal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor


class AwqFormat(Format):
    """Integers `[cols, rows / 8]` packed along the output features, scales and zero points `[groups, rows]`."""

    name = "awq"
    method = "awq"
    layouts = ("awq",)
    suffixes = ("qweight", "qzeros", "scales")
    widths = (4,)
    zeros = "qzeros"
    order = "g_idx"  # which some tools write, and readers overlook
    rules = (
        *MIXTURES,
        *WIDTHS,
        (
            lambda r: r.int8,
            Refusal(
                "format 'awq' holds 4-bit integers only, and the plan has INT8 layers",
                "are compressed-tensors and gptq",
                "--format compressed-tensors",
            ),
        ),
        (
            lambda r: r.several_sizes,
            Refusal(
                "format 'awq' holds one group size, and the plan's modules have several",
                "is a plan whose units have one size",
                "--group-size {r.smallest_size} for a plan of one size, or --format compressed-tensors",
            ),
        ),
        TEXT_ONLY,
        MERGED_NAMES,
        SINGLE_UNITS,
    )
    uniform = True

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that stands for a module of these sizes."""
        return {
            "qweight": ("I32", (grid.cols, grid.words(grid.rows))),
            "qzeros": ("I32", (grid.groups, grid.words(grid.rows))),
            "scales": (None, (grid.groups, grid.rows)),
        }

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows by the scales, and columns by the integers."""
        return int(parts["scales"].shape[1]), int(parts["qweight"].shape[0])

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        """Return the words of a column, its integers, and the number of groups."""
        return shapes["qweight"][-1], rows, shapes["scales"][0]

    def check_module(self, module: str, grid: StoredGrid) -> None:
        """Refuse a module of other bits, or whose rows or columns do not fill words.

        Raises:
            UnsupportedModelError: not 4 bits, or a width or height that is not a multiple of 8.
        """
        super().check_module(module, grid)
        check_whole_words(self.name, module, grid)

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        from quant_fairness_kernels.packing import pack_awq  # torch

        return dict(pack_awq(tensor.integers, tensor.scales, tensor.zeros)._asdict())

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `pack` stored. Exact inverse."""
        from quant_fairness_kernels.packing import AwqTensors, unpack_awq  # torch

        from quant_fairness_plugin.quantize.grid import QuantizedTensor  # torch

        integers, scales, zeros = unpack_awq(AwqTensors(*(parts[suffix] for suffix in self.suffixes)))
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def added_tensors(self, model: PreTrainedModel) -> dict[str, int]:
        """Return the scales of activations that Transformers wants in every block; ours are ones."""
        return activation_scales(model)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return the `quantization_config` entry of `config.json`."""
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
        """Return `quantize_config.json`, which older loaders read instead of `config.json`."""
        return {"quantize_config.json": self.quantization_config(modules, grid)}

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong: the only scheme that all readers have in common is 4-bit gemm with zero points."""
        expected = {"quant_method": self.method, "bits": STORED_BITS, "zero_point": True, "version": "gemm"}
        yield from wrong_fields(quantization, expected | {"desc_act": False, "lm_head": False})
        yield from wrong_group_size(quantization)
        yield from wrong_rules(quantization)
        yield from wrong_skip_list(quantization)
        for name, bits in modules.bits.items():
            if bits not in self.widths:
                yield f"{name} has {bits} bits; expected: 4 bits in awq"
