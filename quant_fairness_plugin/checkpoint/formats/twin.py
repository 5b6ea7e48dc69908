"""`fp16-twin`: a plain 16-bit checkpoint with the dequantized values. It packs nothing and loads everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.format import Format, Quantization, Shape, StoredGrid, TensorKind
from quant_fairness_plugin.checkpoint.refusals import Rule
from quant_fairness_plugin.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from quant_fairness_plugin.checkpoint.module_map import ModuleMap
    from quant_fairness_plugin.quantize.grid import QuantizedTensor


class TwinFormat(Format):
    """A format without quantized modules, and so without metadata; it holds every grid."""

    name = "fp16-twin"
    method = ""
    rules: ClassVar[tuple[Rule, ...]] = ()

    def shapes(self, grid: StoredGrid) -> dict[str, TensorKind]:
        """Return nothing: no module is packed."""
        return {}

    def quantization_config(self, modules: ModuleMap, grid: Grid) -> dict[str, Any]:
        """Return nothing: there is no such entry in a plain checkpoint."""
        return {}

    def scheme_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield that there is metadata, where there should be none."""
        if quantization:
            yield f"quant_method is {quantization.get('quant_method')!r}; expected: no metadata in a plain checkpoint"

    def size(self, parts: Mapping[str, Tensor]) -> NoReturn:
        """Refuse: there are no such tensors."""
        self._refuse()

    def packed(self, shapes: Mapping[str, Shape], rows: int, cols: int) -> NoReturn:
        """Refuse: there are no such tensors."""
        self._refuse()

    def pack(self, tensor: QuantizedTensor) -> NoReturn:
        """Refuse: the dequantized values are written instead."""
        self._refuse()

    def unpack(self, parts: Mapping[str, Tensor], grid: Grid) -> NoReturn:
        """Refuse: there are no such tensors."""
        self._refuse()

    def check_module(self, module: str, grid: StoredGrid) -> NoReturn:
        """Refuse every module."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"format {self.name!r} stores no quantized modules as tensors of a folder; those that do are "
            "compressed-tensors, gptq, awq. Use one."
        )
