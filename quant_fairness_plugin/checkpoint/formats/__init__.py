"""Checkpoint formats, one file per format; each is described once, by a `Format`. No torch until tensors come.

A format says how one quantized module is laid out in tensors, which grids it holds, and which metadata makes every
loader treat exactly the right modules as quantized. It neither reads nor writes files.
"""

from __future__ import annotations

from collections.abc import Iterable

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.formats.awq import AwqFormat
from quant_fairness_plugin.checkpoint.formats.compressed_floats import Fp8Tensors, Mxfp4Tensors, Nvfp4Tensors
from quant_fairness_plugin.checkpoint.formats.compressed_tensors import CompressedTensorsFormat
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.formats.gguf import GgufFormat
from quant_fairness_plugin.checkpoint.formats.gptq import GptqFormat, GptqVersion2
from quant_fairness_plugin.checkpoint.formats.twin import TwinFormat
from quant_fairness_plugin.errors import ConfigError


def _by_name(formats: Iterable[Format]) -> dict[str, Format]:
    return {entry.name: entry for entry in formats}


FORMATS = _by_name(
    (
        CompressedTensorsFormat(),
        GptqFormat(),
        AwqFormat(),
        TwinFormat(),
    )
)
"""What can be written, by the name that users give. To add a format, add its file and its line."""
FILES = _by_name((GgufFormat(),))
"""What is written as one file, by `quantize` alone."""
READ_ONLY = _by_name((GptqVersion2(),))
"""What other tools write and only readers meet."""


FLOATS: dict[tuple[str, str], Format] = {
    (form.name, form.scheme.name): form for form in (Fp8Tensors(), Nvfp4Tensors(), Mxfp4Tensors())
}
"""Name of a format and scheme → how it stores what is no integer."""


def checkpoint_format(name: str) -> Format:
    """Return the format of a given name.

    Raises:
        ConfigError: an unknown name.
    """
    every = {**FORMATS, **FILES}
    if name not in every:
        raise ConfigError(f"unknown format {name!r}; known are {', '.join(every)}. Correct --format.")
    return every[name]


def stored_format(name: str, grid: Grid) -> Format:
    """Return how a format of a given name stores the modules of a grid.

    Raises:
        ConfigError: an unknown name.
    """
    return FLOATS.get((name, grid.scheme), checkpoint_format(name))


def check_folder_format(name: str) -> None:
    """Refuse a format of one file where a folder is to be written.

    Raises:
        ConfigError: it is one, or an unknown name.
    """
    if checkpoint_format(name).one_file:
        raise ConfigError(
            f"format {name!r} is one file, and a folder is to be written; accepted are {', '.join(FORMATS)}. Use "
            f"quantize MODEL --format {name} -o NAME.{name} (in Python save_{name})"
        )


def format_of_layout(layout: str) -> Format:
    """Return the description of a layout of the independent reader, such as `gptq_v2`.

    Raises:
        ConfigError: no format describes it.
    """
    for entry in (*FORMATS.values(), *READ_ONLY.values()):
        if layout in entry.layouts:
            return entry
    raise ConfigError(f"no format describes the layout {layout!r}; read-only ones belong in READ_ONLY")


def marker_of_method(method: object) -> str | None:
    """Return the suffix of the tensor that marks a module as quantized; None for an unknown `quant_method`."""
    return next((entry.suffixes[0] for entry in FORMATS.values() if entry.packs and entry.method == method), None)
