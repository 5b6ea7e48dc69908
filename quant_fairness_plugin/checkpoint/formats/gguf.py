"""`gguf`: one file for llama.cpp, its embedding in 8 bits. `export.gguf` writes it; here is what it can hold."""

from __future__ import annotations

from quant_fairness_plugin.checkpoint.formats.format import FLOATS
from quant_fairness_plugin.checkpoint.formats.twin import TwinFormat
from quant_fairness_plugin.checkpoint.refusals import Refusal
from quant_fairness_plugin.model.gguf import BLOCK, FORMAT, TYPES

_KINDS = ("fp16", *(f"int{bits}" for bits in TYPES))


class GgufFormat(TwinFormat):
    """A format of one file, which is no folder of tensors that readers of `READERS` load."""

    name = FORMAT
    one_file = True
    rules = (
        *FLOATS,
        (
            lambda r: r.grid.bits not in TYPES,
            Refusal("GGUF files are not written with {r.grid.bits} bits", "are 4, 5 and 8", "--bits 4, 5 or 8"),
        ),
        (
            lambda r: not r.grid.symmetric,
            Refusal("llama.cpp's Q4_0, Q5_0 and Q8_0 have no zero points", "is a symmetric grid", "--sym"),
        ),
        (
            lambda r: r.grid.group_size != BLOCK,
            Refusal(
                "group size {r.grid.group_size} saves nothing in a GGUF file, where every 32 weights have a scale",
                "is 32",
                "--group-size 32, or leave it out",
            ),
        ),
        (
            lambda r: any(kind not in _KINDS for kind in r.overrides.values()),
            Refusal("layers or units in other widths are not written", "are fp16, int8, int5 and int4", "int8 instead"),
        ),
        (
            lambda r: r.mixture or r.wrapped,
            Refusal(
                "mixtures of experts, and models that also see or hear, are not written as GGUF here",
                "are text decoders without experts",
                "recommend --as llama.cpp, and llama-quantize",
            ),
        ),
    )
