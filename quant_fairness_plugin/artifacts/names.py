"""The names that results use, for precisions, parts, modes and the like. Plain types, no torch."""

from __future__ import annotations

import re
from typing import Literal, get_args

from quant_fairness_plugin.errors import ConfigError

SchemeName = Literal["int", "fp8", "nvfp4", "mxfp4"]
"""What the codes of quantized weights are: integers, or floats (facts of each: `quantize.schemes`)."""
Precision = Literal["fp16", "int8", "int6", "int5", "int4g32", "int4", "int3", "int2", "fp8", "nvfp4", "mxfp4"]
"""`int4g32`: four bits in groups of 32, beside larger groups. The integers from the widest to the narrowest."""
FINE_GROUPS: Precision = "int4g32"
FINEST_GROUP = 32
Part = Literal["calibrate", "search", "confirm", "all"]
Status = Literal["supported", "unsupported", "collapsed"]
Fluency = Literal["fluent", "weak", "none"]
"""How well the 16-bit model speaks a language: better than a byte n-gram, better than byte counts, or not even that."""
Mode = Literal["protect-one", "quantize-one"]
"""What a sweep singles units out for: to keep them in 16 bit, or to quantize nothing but them."""
Granularity = Literal["layer", "unit"]
"""What a sweep singles out: whole layers, or the fusion groups in them."""
SearchMethod = Literal["greedy", "backward", "beam"]
"""How sets of units are looked for: one more at a time, one fewer from all, or as `greedy` with the best few kept."""
Clip = Literal["absmax", "mse", "gaussian", "laplace", "student-t", "empirical", "minimax"]
Effort = Literal["fast", "normal", "best"]
"""How much work goes into the integers of a checkpoint of the same bytes."""
Weighting = Literal["uniform", "proportional", "english", "minimax"]
"""How much each language counts in calibration."""
Start = Literal["auto", "encoded", "bos", "eos", "chat", "plain"]
"""What stands before a text that a model reads: see `model.beginnings`."""
Reader = str
"""A name in `checkpoint.readers.READERS`, which checks it."""
CheckpointFormat = str
"""A name in `checkpoint.formats.FORMATS`, which checks it: a new format touches no type."""


def precision_of_bits(bits: int) -> Precision:
    """The name of a bit width in a plan.

    Raises:
        ConfigError: a width without one (7).
    """
    names: dict[int, Precision] = {2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8", 16: "fp16"}
    if bits not in names:
        raise ConfigError(f"{bits} bits have no name in a plan; use one of {', '.join(map(str, names))}")
    return names[bits]


def bits_of_precision(precision: Precision) -> int:
    """`int4` → 4, `int4g32` → 4, `nvfp4` → 4, `fp16` → 16; scales are not counted."""
    found = re.match(r"[a-z]+(\d+)", precision)
    assert found is not None, "every precision is named by its bits"
    return int(found[1])


def precision_order(precision: Precision) -> int:
    """Return a number that is larger for a precision of more bits, scales included."""
    return -get_args(Precision).index(precision)


def precision_words(precision: Precision) -> str:
    """Return `8 bit`, or `4 bit in groups of 32`."""
    groups = f" in groups of {FINEST_GROUP}" if precision == FINE_GROUPS else ""
    return f"{bits_of_precision(precision)} bit{groups}"
