r"""`gptq` version 1, for gptqmodel, optimum, exllama and vLLM.

Each loader decides by another list which modules are quantized, so all of them are written ("universal metadata"):

- optimum (Transformers): `modules_in_block_to_quantize`, a list of lists, matched as a *suffix*;
- vLLM: the same list as a *substring* of the parts of a merged module, or a `-:` rule of `dynamic`;
- gptqmodel and SGLang: only `dynamic`, with `re.match` on the name, which in servers is the merged one;
- others: `modules_to_not_convert`, a regular expression or a substring.

Modules of 8 bits in a 4-bit checkpoint, or of another group size, have a `+:` rule of `dynamic`, which optimum ignores.

Full names are safe in all of these readings. A trailing dot is not: as a regular expression `layers.1.` is also the
beginning of `layers.10`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.format import (
    MERGED_NAMES,
    MIXTURES,
    SINGLE_UNITS,
    TEXT_ONLY,
    WIDTHS,
    WORD_BITS,
    Format,
    Quantization,
    Shape,
    StoredGrid,
    TensorKind,
    wrong_fields,
    wrong_names,
)
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS, Refusal
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.quantize.grid_rules import GROUP_SIZES, PACKED_MULTIPLE

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor

WIDE_BITS = 8
"""The other width, which single modules get by a `+:` rule."""


class GptqFormat(Format):
    """Integers packed along the input features and transposed, scales `[groups, rows]`, zero points minus one."""

    name = "gptq"
    method = "gptq"
    layouts = ("gptq",)
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    zeros = "qzeros"
    zero_offset = 1
    order = "g_idx"
    rules = (
        *MIXTURES,
        *WIDTHS,
        (
            lambda r: not r.grid.symmetric,
            Refusal(
                "format 'gptq' with an asymmetric grid is refused, because vLLM reads only symmetric gptq files",
                "is a symmetric grid",
                "--sym, or --format compressed-tensors",
            ),
        ),
        TEXT_ONLY,
        MERGED_NAMES,
        SINGLE_UNITS,
    )

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that stands for a module of these sizes."""
        return {
            "qweight": ("I32", (grid.words(grid.cols), grid.rows)),
            "qzeros": ("I32", (grid.groups, grid.words(grid.rows))),
            "scales": (None, (grid.groups, grid.rows)),
            "g_idx": ("I32", (grid.cols,)),
        }

    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows by the scales, and columns by the words, as wide as the zero points say."""
        groups, rows = parts["scales"].shape
        for bits in self.widths:
            if StoredGrid(rows, rows, bits, groups).words(rows) == parts["qzeros"].shape[1]:
                return rows, int(parts["qweight"].shape[0]) * WORD_BITS // bits
        raise ValueError(f"{rows} zero points of a group in {parts['qzeros'].shape[1]} words")

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        """Return the words of a row, its integers, and the number of groups."""
        return shapes["qweight"][0], cols, shapes["scales"][0]

    def check_module(self, module: str, grid: StoredGrid) -> None:
        """Refuse a module whose rows or columns do not fill words.

        Raises:
            UnsupportedModelError: a width or height that is not a multiple of 8.
        """
        super().check_module(module, grid)
        check_whole_words(self.name, module, grid)

    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""
        from quant_fairness_kernels.packing import pack_gptq  # torch

        return dict(pack_gptq(tensor.integers, tensor.scales, tensor.zeros, bits=tensor.grid.bits)._asdict())

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `pack` stored. Exact inverse."""
        from quant_fairness_kernels.packing import GptqTensors, unpack_gptq  # torch

        from quant_fairness_plugin.quantize.grid import QuantizedTensor  # torch

        stored = GptqTensors(*(parts[suffix] for suffix in self.suffixes))
        integers, scales, zeros = unpack_gptq(stored, bits=grid.bits)
        return QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=grid)

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return the `quantization_config` entry of `config.json`."""
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "checkpoint_format": self.name,
            "lm_head": False,
            "dynamic": {rule: {} for rule in skip_rules(modules)} | scheme_rules(modules, grid),
            "modules_in_block_to_quantize": [list(modules.quantized)],
            "modules_to_not_convert": [*modules.kept_in_blocks, *modules.kept_fused],
        }

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """Return `quantize_config.json`, which older loaders read instead of `config.json`."""
        return {"quantize_config.json": self.quantization_config(modules, grid)}

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong: fields without which a loader guesses, or lists that are none."""
        yield from wrong_fields(quantization, {"quant_method": self.method, "bits": STORED_BITS, "sym": True})
        yield from wrong_fields(quantization, {"desc_act": False, "checkpoint_format": self.name, "lm_head": False})
        yield from wrong_group_size(quantization)
        yield from wrong_rules(quantization)
        yield from wrong_skip_list(quantization)
        lists = quantization.get("modules_in_block_to_quantize")
        if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
            yield (
                f"modules_in_block_to_quantize is a {type(lists).__name__}, or not one of lists; expected: a list of "
                "lists of full names"
            )


class GptqVersion2(GptqFormat):
    """As `GptqFormat`, with zero points as they are. Read, and never written: few loaders know it."""

    name = "gptq_v2"
    layouts = ("gptq_v2",)
    zero_offset = 0


def skip_rules(modules: ModuleMap) -> tuple[str, ...]:
    r"""Return the `dynamic` keys that exclude every 16-bit module of the blocks, under its plain and its merged name.

    What no module of the model has is excluded too: a server may have a module for it.

    A block without quantized modules takes one rule, `-:^model\.layers\.1\..*`; a single module one with its full name.
    """
    layers = modules.kept_layers
    single = [
        name
        for name in (*modules.kept_in_blocks, *modules.kept_fused)
        if not any(name.startswith(f"{layer}.") for layer in layers)
    ]
    whole = [f"-:^{re.escape(name)}\\..*" for name in (*layers, *modules.unread)]
    return tuple(whole + [f"-:^{re.escape(name)}$" for name in single])


def scheme_rules(modules: ModuleMap, grid: Grid) -> dict[str, dict[str, int]]:
    r"""Return the `dynamic` rules of modules with other bits or groups than the grid's, plain and merged names.

    A rule holds a full name up to its end, so that that of `layers.1` matches nothing of `layers.10`.
    """
    changes: dict[str, dict[str, int]] = {}
    for name in modules.quantized:
        own = {"bits": modules.bits.get(name, grid.bits), "group_size": modules.sizes.get(name, grid.group_size)}
        changes[name] = {key: value for key, value in own.items() if value != getattr(grid, key)}
    merged = {name: changes[parts[0]] for name, parts in modules.fused.items() if parts[0] in changes}
    return {f"+:^{re.escape(name)}$": change for name, change in (*changes.items(), *merged.items()) if change}


def check_whole_words(format_name: str, module: str, grid: StoredGrid) -> None:
    """Refuse a module whose rows or columns do not fill words of eight integers.

    Raises:
        UnsupportedModelError: a width or height that is not a multiple of 8.
    """
    if grid.rows % PACKED_MULTIPLE or grid.cols % PACKED_MULTIPLE:
        raise UnsupportedModelError(
            f"{module} is [{grid.rows}, {grid.cols}]; {format_name} checkpoints need multiples of {PACKED_MULTIPLE} in "
            "both directions. Use --format compressed-tensors."
        )


def wrong_group_size(quantization: Quantization) -> Iterator[str]:
    """Yield a group size that not all loaders read."""
    size = quantization.get("group_size")
    if size not in GROUP_SIZES:
        yield f"group_size is {size!r}; expected: 32, 64, 128 or -1"


def wrong_rules(quantization: Quantization) -> Iterator[str]:
    """Yield what `dynamic` holds beside rules that skip a module and rules that give it 8 bits or a group size."""
    rules = quantization.get("dynamic")
    if not isinstance(rules, dict):
        yield f"dynamic is {rules!r}; expected: a table of rules"
        return
    for rule, change in rules.items():
        if (rule[:2], change) != ("-:", {}) and not (rule.startswith("+:") and _is_scheme(change)):
            yield (
                f"dynamic holds {rule!r}: {change!r}; expected: '-:' rules, and '+:' rules that say bits {WIDE_BITS} "
                "or a group_size of 32, 64, 128 or -1"
            )


def _is_scheme(change: object) -> bool:
    """Return whether the change of a `+:` rule is 8 bits, a group size, or both."""
    if not isinstance(change, dict) or not change or not change.keys() <= {"bits", "group_size"}:
        return False
    return change.get("bits", WIDE_BITS) == WIDE_BITS and change.get("group_size", -1) in GROUP_SIZES


def wrong_skip_list(quantization: Quantization) -> Iterator[str]:
    """Yield why `modules_to_not_convert` is not a list of names, or which entry takes too much.

    As a regular expression `layers.1.` is also the beginning of `layers.10`.
    """
    malformed = list(wrong_names(quantization, "modules_to_not_convert"))
    yield from malformed
    for entry in () if malformed else quantization["modules_to_not_convert"]:
        if entry.endswith("."):
            yield f"modules_to_not_convert holds {entry!r}; expected: full names without a trailing dot"
