"""Step 7, checkpoint formats: one file per format, each behind the same `Format` protocol.

A format says how one quantized module is laid out in tensors, and which metadata makes every loader treat exactly the
right modules as quantized. It neither reads nor writes files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.formats.support import FORMATS, READERS, check_exportable, check_format_name

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.quantize.grid import QuantizedTensor


__all__ = ["FORMATS", "READERS", "Format", "ModuleMap", "check_exportable", "checkpoint_format"]


@dataclass(frozen=True, slots=True)
class ModuleMap:
    """Which linear modules of a model are quantized, under every name that a loader may ask for. Full names only."""

    blocks: str
    """Full name of the list of decoder blocks."""
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    """Every other linear module of the model, the head included."""
    fused: Mapping[str, tuple[str, ...]]
    """Name of a module that servers merge → the modules that it is merged from."""
    bits: Mapping[str, int] = field(default_factory=dict)
    """Quantized module → bits, where they are not the grid's own (INT8 units)."""
    aliases: tuple[str, ...] = ()
    """Further names under which servers know kept modules, such as GPT-NeoX's `embed_out`."""

    @property
    def kept_in_blocks(self) -> tuple[str, ...]:
        """Kept modules of the decoder blocks, without the head."""
        return tuple(name for name in self.kept if name.startswith(f"{self.blocks}."))

    @property
    def split_groups(self) -> tuple[str, ...]:
        """Merged modules whose parts differ in precision (16 bit, 8 bit or the grid's): no server can load these."""
        widths = dict.fromkeys(self.kept, 16) | dict(self.bits)
        return tuple(name for name, parts in self.fused.items() if len({widths.get(part, 0) for part in parts}) > 1)

    @property
    def kept_fused(self) -> tuple[str, ...]:
        """Merged modules of which all parts are kept."""
        kept = set(self.kept)
        return tuple(name for name, parts in self.fused.items() if kept.issuperset(parts))

    @property
    def kept_layers(self) -> tuple[str, ...]:
        """Full names of the blocks in which nothing is quantized, in order."""
        busy = {self._layer(name) for name in self.quantized}
        layers = dict.fromkeys(self._layer(name) for name in self.kept_in_blocks)
        return tuple(name for name in layers if name not in busy)

    def _layer(self, module: str) -> str:
        index = module.removeprefix(f"{self.blocks}.").partition(".")[0]
        return f"{self.blocks}.{index}"


class Format(Protocol):
    """How a checkpoint format stores quantized modules."""

    @property
    def name(self) -> str:
        """The format's name."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the tensors that stand for one module's weight. The first one marks a module as quantized."""

    def tensors(self, module: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors that stand for `<module>.weight`, by full name."""

    def read_back(self, module: str, tensors: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
        """The module that `tensors` stored. Exact inverse."""

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""

    def side_files(self, modules: ModuleMap, grid: Grid) -> dict[str, dict[str, Any]]:
        """Further JSON files that loaders of this format look for, by file name."""


def checkpoint_format(name: str) -> Format:
    """The format of a given name.

    Raises:
        ConfigError: an unknown name, or `fp16-twin`, which has nothing to lay out.
    """
    check_format_name(name)
    from quant_fairness_plugin.export.formats.awq import AwqFormat
    from quant_fairness_plugin.export.formats.compressed_tensors import CompressedTensorsFormat
    from quant_fairness_plugin.export.formats.gptq import GptqFormat

    formats: dict[str, Format] = {
        "compressed-tensors": CompressedTensorsFormat(),
        "gptq": GptqFormat(),
        "awq": AwqFormat(),
    }
    if name not in formats:
        raise ConfigError(f"format {name!r} stores no quantized modules; allowed are {', '.join(formats)}. Use one.")
    return formats[name]
