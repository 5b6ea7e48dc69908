"""The record of an exported checkpoint folder: what is in it and how it was made."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.artifacts.measurements import Measurement
from quant_fairness_plugin.artifacts.names import CheckpointFormat
from quant_fairness_plugin.artifacts.numbers import Undefined
from quant_fairness_plugin.artifacts.plans import ProtectionPlan
from quant_fairness_plugin.artifacts.provenance import NO_SURPRISES, Provenance
from quant_fairness_plugin.artifacts.reading import ReaderRun
from quant_fairness_plugin.artifacts.used import UsedSentences

RECORD_NAME = "quant_fairness.json"
"""The file of a checkpoint folder that holds its `ExportRecord`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """`quant_fairness.json`: what is in a checkpoint folder and how it was made."""

    __pydantic_config__: ClassVar[ConfigDict] = NO_SURPRISES

    schema_version: Literal[1] = 1
    kind: Literal["export"] = "export"
    provenance: Provenance
    method: str
    """Who computed the integers: a name of `quantize.methods.METHODS`."""
    format: CheckpointFormat
    plan: ProtectionPlan
    family: str
    quantized_modules: dict[str, int]
    """Full module name → bits."""
    kept_modules: dict[str, str]
    """Module in 16 bit although its layer is quantized → reason (for example a width that no group divides)."""
    linear_modules: int
    """How many linear modules the blocks have, quantized or not."""
    sixteen_bit_bytes: int
    """What all parameters would take in 16 bit."""
    calibration: dict[str, Any]
    measurement: Measurement | None
    group_sizes: dict[str, int] = field(default_factory=dict)
    """Quantized module → its group size, where it is not that of the plan's grid."""
    protected_columns: dict[str, int] = field(default_factory=dict)
    """Module → how many of its input channels are in `quant_fairness_columns.safetensors` too, in 16 bit."""
    copied_tensors: dict[str, str] = field(default_factory=dict)
    """Tensor in the files → checksum, of those that are the source's byte for byte, and were never computed with: parts
    that are not text, and what no module of the model has."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    reader_run: ReaderRun | Undefined | None = None
    """The reader that loaded the folder when it was written and verified, or why none did; None in older records."""
    experts: ExpertCoverage | None = None
    """Of a mixture of experts that was calibrated: the tokens of every language that reached each expert."""
    unprotected: Measurement | None = None
    """Of the same quantization without protection, on the sentences of `measurement`; None where that was not made."""
    sentences: UsedSentences | None = None
    """Those that it was calibrated on, and that its plan was searched on; None in older records."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.bytes_ for name, file in self.files.items() if name.endswith(".safetensors"))

    @property
    def sizes(self) -> dict[str, int]:
        """Group size of every quantized module."""
        return {name: self.group_sizes.get(name, self.plan.grid.group_size) for name in self.quantized_modules}

    @property
    def grids(self) -> str:
        """The grid with the group size of most modules, and how many modules have another: for people to read."""
        counts = Counter(self.sizes.values()).most_common()
        usual = counts[0][0] if counts else self.plan.grid.group_size
        others = [
            f"{count} of {len(self.quantized_modules)} modules {replace(self.plan.grid, group_size=size).groups}"
            for size, count in counts[1:]
        ]
        return " · ".join([str(replace(self.plan.grid, group_size=usual)), *others])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and checksum of one file of a checkpoint folder."""

    bytes_: int
    sha256: str
