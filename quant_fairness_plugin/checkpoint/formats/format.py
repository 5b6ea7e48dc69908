"""What every checkpoint format owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from quant_fairness_plugin.artifacts import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor


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
