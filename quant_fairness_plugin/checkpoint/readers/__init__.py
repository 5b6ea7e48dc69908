"""Step 7, what can be written for which reader. Asked at plan time, before anything is quantized; imports no torch.

`RULES` is the table: each row says when a combination is refused, why, and the ways out. The first row that applies
speaks. Rows were measured with the real readers where docs/readers.md has the cell, and read in their source elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from quant_fairness_plugin.artifacts import CheckpointFormat as CheckpointFormat
from quant_fairness_plugin.artifacts import Grid, Precision, Reader
from quant_fairness_plugin.checkpoint.formats import check_format_name
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.families import Family

READERS: tuple[Reader, ...] = get_args(Reader)
TWIN = "--format fp16-twin (a plain 16-bit checkpoint with the dequantized values, which loads everywhere)"
STORED_BITS = 4
"""The only width of a whole checkpoint; single layers can have 8."""
_NOTHING: Mapping[str, Precision] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Request:
    """What somebody wants written, as far as it is known."""

    format: str
    grid: Grid
    reader: str | None
    overrides: Mapping[str, Precision]
    family: str | None
    """The family's name; None before the model is known."""
    conv1d: bool
    """Whether the linear modules store their weight transposed."""

    @property
    def int8(self) -> bool:
        """Whether a layer or unit gets 8 bits."""
        return "int8" in self.overrides.values()

    @property
    def simulated(self) -> tuple[str, ...]:
        """Precisions of single layers or units that no checkpoint holds."""
        return tuple(sorted({kind for kind in self.overrides.values() if kind not in ("fp16", "int8", "int4")}))

    @property
    def single_units(self) -> tuple[str, ...]:
        """Overrides of single units, `layers.3.down`, rather than of whole layers."""
        return tuple(name for name in self.overrides if name.count(".") > 1)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row of the table: why not, what is allowed instead, and how to ask for it."""

    reason: str
    allowed: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.reason}; allowed {self.allowed}. Use {self.way_out}."


Rule = tuple[Callable[[Request], bool], Refusal]
"""When a combination is refused, and the refusal; `{r.…}` in its texts is filled from the request."""

RULES: tuple[Rule, ...] = (
    # What a format can hold.
    (
        lambda r: r.grid.bits != STORED_BITS,
        Refusal(
            "checkpoints of {r.grid.bits} bits are not written (other widths are simulation only)",
            "is 4",
            f"--bits 4, or {TWIN}",
        ),
    ),
    (
        lambda r: bool(r.simulated),
        Refusal(
            "layers of {r.simulated[0]} are not written (simulation only)",
            "are fp16, int8 and int4",
            f"int8 instead, or {TWIN}",
        ),
    ),
    (
        lambda r: r.format == "gptq" and not r.grid.symmetric,
        Refusal(
            "format 'gptq' with an asymmetric grid is refused, because vLLM reads only symmetric gptq files",
            "is a symmetric grid",
            "--sym, or --format compressed-tensors",
        ),
    ),
    (
        lambda r: r.format == "awq" and r.int8,
        Refusal(
            "format 'awq' holds 4-bit integers only, and the plan has INT8 layers",
            "are compressed-tensors and gptq",
            "--format compressed-tensors",
        ),
    ),
    # What must be known about an architecture.
    (
        lambda r: r.family == "generic" and r.format in ("gptq", "awq"),
        Refusal(
            "format '{r.format}' needs the merged module names of a known family, and this architecture is not one",
            "is compressed-tensors",
            f"that, or {TWIN}",
        ),
    ),
    (
        lambda r: r.family == "generic" and bool(r.single_units),
        Refusal(
            "{r.single_units[0]} cannot have a precision of its own, because servers may merge it with others and this "
            "architecture is not a known family",
            "are whole layers",
            f"--protect-layers, or {TWIN}",
        ),
    ),
    # Transformers.
    (
        lambda r: r.conv1d and r.reader == "transformers",
        Refusal(
            "{r.family} keeps its weights in Conv1D modules, which Transformers does not load quantized (gptq, awq) or "
            "fills with random numbers and no more than a warning (compressed-tensors)",
            "are another reader or a plain format",
            f"--reader vllm, or {TWIN}",
        ),
    ),
    (
        lambda r: r.format == "gptq" and r.int8 and r.reader == "transformers",
        Refusal(
            "format 'gptq' says by `dynamic` rules which layers are INT8, and Transformers ignores them",
            "are the readers vllm and gptqmodel",
            "--format compressed-tensors, or --reader vllm",
        ),
    ),
    # vLLM.
    (
        lambda r: r.family == "bloom" and r.reader == "vllm",
        Refusal(
            "vLLM cannot load a quantized BLOOM in any format",
            "is reader transformers",
            f"--reader transformers, or {TWIN}",
        ),
    ),
    (
        lambda r: r.family == "gpt_neox" and r.format == "awq" and r.reader == "vllm",
        Refusal(
            "format 'awq' of {r.family} holds mlp.act.scales, without which Transformers computes NaN, and which make "
            "vLLM fail",
            "are another reader, or compressed-tensors and gptq",
            "--format compressed-tensors, or --reader transformers",
        ),
    ),
    # gptqmodel.
    (
        lambda r: r.conv1d and r.format == "compressed-tensors" and r.reader == "gptqmodel",
        Refusal(
            "gptqmodel hands format 'compressed-tensors' to Transformers, which fills the Conv1D modules of "
            "{r.family} with random numbers and gives no more than a warning",
            "is gptq",
            f"--format gptq, --reader vllm, or {TWIN}",
        ),
    ),
    (
        lambda r: r.family == "gpt_neox" and r.format in ("gptq", "awq") and r.reader == "gptqmodel",
        Refusal(
            "gptqmodel leaves the head of {r.family} uninitialised: checkpoints of this family call it embed_out, and "
            "gptqmodel looks for lm_head",
            "are another reader, or compressed-tensors",
            "--format compressed-tensors, or --reader transformers",
        ),
    ),
)


def check_exportable(
    family: Family | None,
    *,
    format: str,
    grid: Grid,
    reader: str | None = "transformers",
    overrides: Mapping[str, Precision] = _NOTHING,
) -> None:
    """Refuse what no loader, or not the wanted one, would read correctly.

    Args:
        family: the model's family map, or None while the model is not known (then its rows are left out).
        format: `compressed-tensors`, `gptq`, `awq` or `fp16-twin`.
        grid: the integer grid of the quantized modules.
        reader: the loader that must read the result, `transformers`, `vllm` or `gptqmodel`; None: any.
        overrides: layers and units with a precision of their own, as in `ProtectionPlan.overrides`.

    Raises:
        ConfigError: an unknown format or reader.
        UnsupportedModelError: a combination that upstream reads wrongly or not at all; names the ways out.
    """
    check_format_name(format)
    if reader not in (None, *READERS):
        raise ConfigError(f"unknown reader {reader!r}; allowed are {', '.join(READERS)}. Correct --reader.")
    refusal = find_refusal(family, format=format, grid=grid, reader=reader, overrides=overrides)
    if refusal is not None:
        raise UnsupportedModelError(str(refusal))


def find_refusal(
    family: Family | str | None,
    *,
    format: str,
    grid: Grid,
    reader: str | None = "transformers",
    overrides: Mapping[str, Precision] = _NOTHING,
) -> Refusal | None:
    """As `check_exportable`, but returns the refusal, or None where the combination can be written and read.

    Args:
        family: as for `check_exportable`, or the family's name, as in `ExportRecord.family`.
        format: the format.
        grid: the grid.
        reader: the reader.
        overrides: precisions of single layers and units.
    """
    if format == "fp16-twin":
        return None
    name, conv1d = (None, False) if family is None or isinstance(family, str) else (family.name, family.conv1d)
    if isinstance(family, str):
        architecture = find_architecture(family)
        name, conv1d = family, architecture is not None and architecture.conv1d
    request = Request(format, grid, reader, overrides, name, conv1d)
    for applies, refusal in RULES:
        if applies(request):
            texts = (text.format(r=request) for text in (refusal.reason, refusal.allowed, refusal.way_out))
            return Refusal(*texts)
    return None
