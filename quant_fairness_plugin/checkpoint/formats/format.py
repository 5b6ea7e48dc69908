"""What every checkpoint format owns: its tensors, the grids that it holds, its metadata. No torch until tensors come.

A new format is one file with a subclass of `Format`, and one line in `FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS, TWIN, Refusal, Rule
from quant_fairness_plugin.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor

WORD_BITS = 32
Quantization = Mapping[str, Any]
"""The `quantization_config` entry of `config.json`."""
Shape = tuple[int, ...]
TensorKind = tuple[str | None, Shape]
"""dtype as safetensors writes it (None: the storage dtype of the checkpoint), and shape."""

INTEGERS_BESIDE: Mapping[int, tuple[Precision, ...]] = {4: ("int8",), 8: ()}
"""Bits of floats → what single modules may be beside them (run: Transformers 5.17 reads it)."""
FLOATS: tuple[Rule, ...] = (
    (
        lambda r: r.floats and r.format != "compressed-tensors",
        Refusal(
            "format '{r.format}' has no place for the floats of scheme '{r.grid.scheme}'",
            "is compressed-tensors",
            f"--format compressed-tensors, --scheme int, or {TWIN}",
        ),
    ),
    (
        # Modules of FP8 and of INT8 would have the same bits, by which their tensors are told apart.
        lambda r: r.floats and bool(set(r.overrides.values()) - {"fp16", r.grid.scheme, *INTEGERS_BESIDE[r.grid.bits]}),
        Refusal(
            "layers or units of other widths beside scheme '{r.grid.scheme}' are not written",
            "are fp16, and int8 beside floats of 4 bits",
            "--protect-layers or --protect-units",
        ),
    ),
    (
        # Run with compressed-tensors 0.19, which unpacks FP4 into bfloat16 whatever the model is loaded in.
        lambda r: r.floats and r.grid.bits == STORED_BITS and r.dtype == "float16",
        Refusal(
            "scheme '{r.grid.scheme}' of a model that is stored in float16 is not read: Transformers unpacks it into "
            "bfloat16 beside layers in float16, and fails",
            "is a model stored in bfloat16, or scheme fp8",
            f"a copy of the model in bfloat16, --scheme fp8, or {TWIN}",
        ),
    ),
    (
        lambda r: r.floats and r.mixture,
        Refusal(
            "experts of {r.family} in scheme '{r.grid.scheme}' are not written: no reader was run on such a checkpoint",
            "is scheme int",
            f"--scheme int, or {TWIN}",
        ),
    ),
)
# Refused by every format that packs integers, in this order.
WIDTHS: tuple[Rule, ...] = (
    *FLOATS,
    (
        lambda r: r.grid.bits != STORED_BITS and not r.floats,
        Refusal(
            "checkpoints of {r.grid.bits} bits are not written (other widths are simulation only)",
            "is 4",
            f"--bits 4, or {TWIN}",
        ),
    ),
    (
        lambda r: bool(r.simulated) and not r.floats,
        Refusal(
            "layers of {r.simulated[0]} are not written (simulation only)",
            "are fp16, int8 and int4",
            f"int8 instead, or {TWIN}",
        ),
    ),
)
SINGLE_UNITS: Rule = (
    lambda r: r.family == "generic" and bool(r.single_units),
    Refusal(
        "{r.single_units[0]} cannot have a precision of its own, because servers may merge it with others and this "
        "architecture is not a known family",
        "are whole layers",
        f"--protect-layers, or {TWIN}",
    ),
)
MIXTURES: tuple[Rule, ...] = (
    (
        # Transformers fills gptq experts at random without an error, and converts only linear modules of awq.
        lambda r: r.mixture and r.format != "compressed-tensors",
        Refusal(
            "format '{r.format}' holds no experts of {r.family} that Transformers reads",
            "is compressed-tensors",
            f"--format compressed-tensors, or {TWIN}",
        ),
    ),
    (
        lambda r: r.mixture and not r.grid.symmetric,
        Refusal(
            "experts of {r.family} on an asymmetric grid are not read: Transformers has no place for their zero points",
            "is a symmetric grid",
            f"--sym, or {TWIN}",
        ),
    ),
    (
        lambda r: r.other_experts,
        Refusal(
            "experts of {r.family} in INT8 or in groups of their own are not read beside those in INT4: readers unpack "
            "all experts of a checkpoint alike",
            "are INT4 and 16 bit for experts, and INT8 for all other units",
            "--protect-units with units such as 3.experts, or single units in INT8",
        ),
    ),
)
MERGED_NAMES: Rule = (
    lambda r: r.family == "generic",
    Refusal(
        "format '{r.format}' needs the merged module names of a known family, and this architecture is not one",
        "is compressed-tensors",
        f"that, or {TWIN}",
    ),
)

TEXT_ONLY: Rule = (
    lambda r: r.wrapped,
    Refusal(
        "format '{r.format}' of a model that also sees or hears is refused: its readers find modules by lists that "
        "each compares with names of its own, and none was run on such a checkpoint",
        "is compressed-tensors",
        f"--format compressed-tensors, or {TWIN}",
    ),
)


@dataclass(frozen=True, slots=True)
class StoredGrid:
    """Sizes of one quantized module, as its tensors show them."""

    rows: int
    cols: int
    bits: int
    groups: int
    """Groups of input channels with a scale of their own."""

    def words(self, integers: int) -> int:
        """Return how many int32 words so many integers fill, the last one perhaps not wholly."""
        return -(-integers * self.bits // WORD_BITS)

    def fits(self, group_size: int) -> bool:
        """Return whether the module has as many groups as a group size gives it."""
        return self.groups == (1 if group_size == -1 else -(-self.cols // group_size))


class Format(ABC):
    """How a checkpoint format stores quantized modules, and how its metadata names them."""

    name: ClassVar[str]
    method: ClassVar[str]
    """`quant_method` in `config.json`."""
    layouts: ClassVar[tuple[str, ...]] = ()
    """Layouts of the independent reader (`dense_modules`) whose modules are described here."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of the tensors that stand for one module's weight, as written here. The first one marks a module as
    quantized; a format without any stores plain 16-bit weights."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Suffixes that a module may lack."""
    widths: ClassVar[tuple[int, ...]] = (4, 8)
    """Bits of an integer that the format can hold."""
    one_file: ClassVar[bool] = False
    """Whether a checkpoint is a file, and no folder that readers load."""
    uniform: ClassVar[bool] = False
    """Whether all quantized modules have one group size."""
    zeros: ClassVar[str] = ""
    """Suffix of the packed zero points."""
    zero_offset: ClassVar[int] = 0
    """What is taken off a zero point before it is stored."""
    order: ClassVar[str] = ""
    """Suffix of the group of every input channel; in order, unless act-order permuted them."""
    rules: ClassVar[tuple[Rule, ...]] = (*WIDTHS, SINGLE_UNITS, *MIXTURES)
    """When a combination is refused because this format cannot hold it."""

    @property
    def packs(self) -> bool:
        """Whether the format stores integers at all."""
        return bool(self.suffixes)

    @abstractmethod
    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return every tensor that can stand for a module of these sizes: suffix → dtype and shape."""

    @abstractmethod
    def size(self, parts: Mapping[str, Tensor]) -> tuple[int, int]:
        """Return rows and columns of a module by its tensors (suffix → tensor) alone.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a width that the format does not hold.
        """

    @abstractmethod
    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> tuple[int, int, int]:
        """Return how many words hold how many integers, and the number of groups.

        Raises:
            KeyError: a tensor is missing.
        """

    @abstractmethod
    def pack(self, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for a module, by suffix."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `pack` stored. Exact inverse."""

    @abstractmethod
    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return the `quantization_config` entry of `config.json`; empty where the format has none."""

    @abstractmethod
    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield what is wrong in metadata of this format, whoever reads it: fields, values, names of no module."""

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """Return further JSON files that loaders of this format look for, by file name."""
        return {}

    def added_tensors(self, model: PreTrainedModel) -> dict[str, int]:
        """Return vectors of ones that loaders want beside the model's own tensors: full name → length."""
        return {}

    def written(self, *, symmetric: bool) -> tuple[str, ...]:
        """Return the suffixes of the tensors that are written for a module."""
        return self.suffixes

    def check_module(self, module: str, grid: StoredGrid) -> None:
        """Refuse a module that the format cannot hold.

        Raises:
            UnsupportedModelError: a width or a size that does not fit; names the module.
        """
        if grid.bits not in self.widths:
            raise UnsupportedModelError(
                f"{module} has {grid.bits} bits; {self.name} checkpoints hold "
                f"{' and '.join(map(str, self.widths))} only. Use --format compressed-tensors."
            )

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors that stand for `<module>.weight`, by full name.

        Raises:
            UnsupportedModelError: the format cannot hold such a module.
        """
        rows, cols = tensor.integers.shape
        self.check_module(module, StoredGrid(rows, cols, tensor.grid.bits, tensor.scales.shape[1]))
        packed = self.pack(tensor)
        return {f"{module}.{suffix}": packed[suffix] for suffix in self.written(symmetric=tensor.grid.symmetric)}

    def read_back(self, module: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """Return the module that `tensors` stored. Exact inverse.

        Raises:
            KeyError: a tensor is missing.
            ValueError: tensors that do not fit together.
        """
        written = self.written(symmetric=grid.symmetric)
        return self.unpack({suffix: tensors[f"{module}.{suffix}"] for suffix in written}, grid)

    def expected(self, grid: StoredGrid, *, symmetric: bool) -> dict[str, TensorKind]:
        """Return the tensors of a module as they are written: suffix → dtype and shape."""
        every = self.shapes(grid)
        return {suffix: every[suffix] for suffix in self.written(symmetric=symmetric)}

    def grid(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> StoredGrid:
        """Return the grid of a module: bits by how many words the integers take, groups by the scales.

        Args:
            shapes: of its tensors, by suffix.
            rows: output channels.
            cols: input channels.

        Raises:
            KeyError: a tensor is missing.
            ValueError: no width of this format fits.
        """
        words, integers, groups = self.packed(shapes, rows, cols)
        for bits in self.widths:
            grid = StoredGrid(rows, cols, bits, groups)
            if grid.words(integers) == words and 0 < groups <= cols:
                return grid
        raise ValueError(
            f"its packed tensor has {words} words for {integers} integers in {groups} groups; accepted are "
            f"{' or '.join(map(str, self.widths))} bits"
        )

    def grid_of(self, parts: Mapping[str, Tensor]) -> StoredGrid:
        """Return the grid of a module by its tensors (suffix → tensor) alone.

        Raises:
            KeyError: a tensor is missing.
            ValueError: no width of this format fits.
        """
        return self.grid({suffix: tuple(tensor.shape) for suffix, tensor in parts.items()}, *self.size(parts))


def wrong_fields(table: Quantization, expected: Mapping[str, Any]) -> Iterator[str]:
    """Yield every field that is missing or has another value or type than expected."""
    for key, value in expected.items():
        if key not in table or table[key] != value or type(table[key]) is not type(value):
            yield f"{key} is {table.get(key, 'missing')!r}; expected: {value!r}"


def wrong_names(quantization: Quantization, key: str) -> Iterator[str]:
    """Yield why a field is not a list of names."""
    names = quantization.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        yield f"{key} is {names!r}; expected: a list of names"
