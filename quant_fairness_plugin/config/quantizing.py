"""How to quantize: method, grid and who does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from quant_fairness_plugin.artifacts import Clip, Effort, SchemeName
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_bits, parse_group_size
from quant_fairness_plugin.quantize.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class QuantizingFields:
    """The fields of `FairConfig` that say how weights are rounded."""

    method: Annotated[str, Option("How weights are rounded:", "How to quantize", metavar="NAME", names=METHODS)] = (
        "gptq"
    )
    bits: Annotated[
        int, Option("Bits of a quantized weight.", "How to quantize", parse=parse_bits, metavar="INTEGER")
    ] = 4
    quantize_rest_to: str | None = None
    """The research scripts' word for `bits`: `INT4` or `INT8`. None where `bits` alone says it."""
    scheme: Annotated[
        SchemeName,
        Option(
            "What weights become: int is integers of --bits bits in groups of --group-size; nvfp4, mxfp4 and fp8 are "
            "floats of 4 or 8 bits with groups of their own, in compressed-tensors alone, made by rtn or gptq:",
            "How to quantize",
        ),
    ] = "int"
    group_size: Annotated[
        int | Literal["auto"],
        Option(
            "Input channels that share a scale, at most: each unit takes the largest of 128, 64, 32 up to it that "
            "divides its input channels ('auto': up to what most of the weights take); -1: all of a row.",
            "How to quantize",
            parse=parse_group_size,
            metavar="auto|32|64|128|-1",
            names=("auto", "32", "64", "128", "-1"),
        ),
    ] = "auto"
    symmetric: Annotated[
        bool | None,
        Option(
            "A symmetric grid, or one with zero points. Default: --asym for awq, else --sym.",
            "How to quantize",
            flag="--sym/--asym",
        ),
    ] = None
    """None = the method's default: AWQ with zero points, the others without (vLLM reads `gptq` files only so)."""
    clip: Annotated[
        Clip | None,
        Option(
            "How the range of a scale is set. Default: mse; for awq, which searches ranges itself, and other backends "
            "absmax. One of:",
            "How to quantize",
        ),
    ] = None
    """None = the method's default; other tools set ranges by rules of their own."""
    effort: Annotated[
        Effort,
        Option(
            "How much work goes into the same bytes (gptq only): fast is GPTQ as published; normal also makes up for "
            "what earlier modules lost and solves scales and integers again; best does that in more rounds.",
            "How to quantize",
        ),
    ] = "normal"
    backend: Annotated[
        str,
        Option(
            "Who quantizes: native, gptqmodel, llmcompressor, or another installed one.",
            "How to quantize",
            metavar="NAME",
            names=("native", "gptqmodel", "llmcompressor"),
        ),
    ] = "native"
    """Our core (`native`), or a name of the entry points `quant_fairness.backends`."""
