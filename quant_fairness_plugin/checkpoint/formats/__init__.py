"""Step 7, checkpoint formats: one file per format, each behind the same `Format` protocol.

A format says how one quantized module is laid out in tensors, and which metadata makes every loader treat exactly the
right modules as quantized. It neither reads nor writes files.
"""

from __future__ import annotations

from typing import get_args

from quant_fairness_plugin.artifacts import CheckpointFormat
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.errors import ConfigError


def checkpoint_format(name: str) -> Format:
    """The format of a given name.

    Raises:
        ConfigError: an unknown name, or `fp16-twin`, which has nothing to lay out.
    """
    check_format_name(name)
    from quant_fairness_plugin.checkpoint.formats.awq import AwqFormat
    from quant_fairness_plugin.checkpoint.formats.compressed_tensors import CompressedTensorsFormat
    from quant_fairness_plugin.checkpoint.formats.gptq import GptqFormat

    formats: dict[str, Format] = {
        "compressed-tensors": CompressedTensorsFormat(),
        "gptq": GptqFormat(),
        "awq": AwqFormat(),
    }
    if name not in formats:
        raise ConfigError(f"format {name!r} stores no quantized modules; allowed are {', '.join(formats)}. Use one.")
    return formats[name]


FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)
"""What can be written. `fp16-twin` is a plain 16-bit checkpoint that holds the dequantized values."""


def check_format_name(name: str) -> None:
    """Check that there is a format of that name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; allowed are {', '.join(FORMATS)}. Correct --format.")
