"""What every reader owns: which modules it leaves in 16 bit, what it refuses and why, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quant_fairness_plugin.checkpoint.formats.format import Quantization
from quant_fairness_plugin.checkpoint.readers.case import Case, MetadataRule
from quant_fairness_plugin.checkpoint.refusals import Rule

NOT_RUN = "documented rules; not run here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A loader of quantized checkpoints."""

    name: str
    metadata: Mapping[str, tuple[MetadataRule, ...]]
    """`quant_method` → how it finds in the metadata which modules are quantized, and with how many bits."""
    problems: Callable[[Case], Iterable[str]]
    """Everything that it would get wrong in a folder that any tool wrote, the most telling first."""
    rules: tuple[Rule, ...] = ()
    """What it would read wrongly or not at all, known at plan time. Rows were measured with the real reader where
    docs/readers.md has the cell, and read in its source elsewhere."""
    uniform: frozenset[str] = frozenset()
    """Formats of which it reads one group size per checkpoint only."""
    script: str | None = None
    """The file in `scripts/` that runs it; None where it is not run here."""
    modules: tuple[str, ...] = ()
    """What the Python that runs it must be able to import."""
    install: str = ""
    """The command that makes such a Python's environment."""
    variable: str = ""
    """Environment variable that names such a Python."""
    on_gpu: Callable[[Quantization], str] = lambda _: ""
    """Why a checkpoint with this metadata is read on a GPU alone, as a clause; empty where a CPU does."""
    missing_kernels: Mapping[str, str] = field(default_factory=dict)
    """Words of its error → what its build lacks on the machine that runs it, as a clause. The files may be right."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`quant_method` → packages that it needs in our own Python, where it can be run there."""

    @property
    def note(self) -> str:
        """How far its verdicts go; empty where they were compared with the real reader."""
        return "" if self.script else NOT_RUN

    def note_on(self, quantization: Quantization) -> str:
        """Return how far its verdict on a checkpoint with this metadata goes; empty where it was compared."""
        why = self.on_gpu(quantization)
        return self.note or (f"{why}; not run here" if why else "")

    def missing_kernel(self, said: str) -> str | None:
        """Return what it lacks here by the error that it ended with; None where the error is of another kind."""
        return next((why for words, why in self.missing_kernels.items() if words in said), None)

    @property
    def script_path(self) -> Path | None:
        """Where the script is: SCRIPT CHECKPOINT REQUEST.json RESULT.json."""
        return Path(__file__).parent / "scripts" / self.script if self.script else None
