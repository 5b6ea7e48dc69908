"""Checkpoint formats, one file per format; each is described once, by a `Format`. No torch until tensors come.

A format says how one quantized module is laid out in tensors, which grids it holds, and which metadata makes every
loader treat exactly the right modules as quantized. It neither reads nor writes files.
"""

from __future__ import annotations

from collections.abc import Iterable

from quant_fairness_plugin.checkpoint.formats.awq import AwqFormat
from quant_fairness_plugin.checkpoint.formats.compressed_tensors import CompressedTensorsFormat
from quant_fairness_plugin.checkpoint.formats.format import Format
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
READ_ONLY = _by_name((GptqVersion2(),))
"""What other tools write and only readers meet."""


def checkpoint_format(name: str) -> Format:
    """Return the format of a given name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; known are {', '.join(FORMATS)}. Correct --format.")
    return FORMATS[name]


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
