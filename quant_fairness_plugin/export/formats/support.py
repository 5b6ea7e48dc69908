"""Step 7, what can be written for which reader. Asked at plan time, before anything is quantized; imports no torch."""

from __future__ import annotations

from typing import Literal

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.families import Family

FORMATS = ("compressed-tensors", "gptq", "fp16-twin")
"""What can be written. `fp16-twin` is a plain 16-bit checkpoint that holds the dequantized values."""
Reader = Literal["transformers", "vllm"]
READERS: tuple[Reader, ...] = ("transformers", "vllm")
_TWIN = "--format fp16-twin (a plain 16-bit checkpoint with the dequantized values, which loads everywhere)"


def check_exportable(
    family: Family,
    *,
    format: str,
    grid: Grid,
    reader: str = "transformers",
) -> None:
    """Refuse what no loader, or not the wanted one, would read correctly.

    Args:
        family: the model's family map.
        format: `compressed-tensors`, `gptq` or `fp16-twin`.
        grid: the integer grid of the quantized modules.
        reader: the loader that must read the result, `transformers` or `vllm`.

    Raises:
        ConfigError: an unknown format or reader.
        UnsupportedModelError: a combination that upstream reads wrongly or not at all; names the ways out.
    """
    check_format_name(format)
    if reader not in READERS:
        raise ConfigError(f"unknown reader {reader!r}; allowed are {', '.join(READERS)}. Correct --reader.")
    if format == "fp16-twin":
        return
    check_format_grid(format, grid)
    _check_reader(family, format, reader)


def check_format_name(name: str) -> None:
    """Check that there is a format of that name.

    Raises:
        UnsupportedModelError: `awq`, which a later version writes.
        ConfigError: any other unknown name.
    """
    if name == "awq":
        raise UnsupportedModelError(
            f"format 'awq' arrives with a later version; allowed now are {', '.join(FORMATS)}. "
            "Use --format compressed-tensors."
        )
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; allowed are {', '.join(FORMATS)}. Correct --format.")


def check_format_grid(format_name: str, grid: Grid) -> None:
    """Refuse a grid that a format cannot hold, or that its readers would misread. Needs no model.

    Raises:
        UnsupportedModelError: not 4 bits, or an asymmetric grid in `gptq`.
    """
    if format_name == "fp16-twin":
        return
    if grid.bits != 4:
        raise UnsupportedModelError(
            f"checkpoints of {grid.bits} bits are not written (other widths are simulation only); allowed is 4. "
            f"Use --bits 4, or {_TWIN}."
        )
    if format_name == "gptq" and not grid.symmetric:
        raise UnsupportedModelError(
            "format 'gptq' with an asymmetric grid is refused, because vLLM reads only symmetric gptq files; allowed "
            "is a symmetric grid. Use that, or --format compressed-tensors."
        )


def _check_reader(family: Family, format_name: str, reader: str) -> None:
    if family.generic and format_name == "gptq":
        raise UnsupportedModelError(
            "format 'gptq' needs the merged module names of a known family, and this architecture is not one; allowed "
            f"is compressed-tensors. Use that, or {_TWIN}."
        )
    if family.conv1d and reader == "transformers":
        raise UnsupportedModelError(
            f"{family.name} keeps its weights in Conv1D modules, which Transformers loads quantized as garbage, "
            f"without an error; allowed are another reader or a plain format. Use --reader vllm, or {_TWIN}."
        )
    if family.name == "bloom" and reader == "vllm":
        raise UnsupportedModelError(
            "vLLM cannot load a quantized BLOOM in any format; allowed is reader transformers. "
            f"Use --reader transformers, or {_TWIN}."
        )
