"""What to protect: layers and units by name, or a budget or target under which they are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import (
    parse_duration,
    parse_int8_layers,
    parse_limits,
    parse_max_size,
    parse_names,
    parse_precisions,
    parse_protection,
    parse_share,
    parse_target,
)
from quant_fairness_plugin.measure.objectives import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class ProtectionFields:
    """The fields of `FairConfig` that say what keeps more bits."""

    protect_layers: Annotated[
        Literal["auto", "none"] | tuple[int, ...],
        Option(
            "Layers that stay in 16 bit: indices from 0, such as 0,9,11; 'auto' chooses a precision for every unit; or "
            "'none'.",
            "What to protect",
            parse=parse_protection,
            metavar="LAYERS",
            names=("auto", "none"),
        ),
    ] = "auto"
    """`auto`: what scores (or a sweep) support within the limits; `none`; or layer indices counted from 0."""
    precisions: Annotated[
        tuple[Precision, ...] | None,
        Option(
            "What 'auto' may give a unit instead of --bits. Default: fp16,int8, with int4g32 (4 bit in groups of 32) "
            "in compressed-tensors and int5 in a GGUF file, as far as the reader allows; fp16 alone sweeps whole "
            "layers.",
            "What to protect",
            parse=parse_precisions,
            metavar="LIST",
            names=("fp16", "fp16,int8", "fp16,int8,int4g32"),
        ),
    ] = None
    """None: the menu, cut to what format and reader allow, by scores of units. `fp16` alone, a `top`, and objectives
    that do not add up over units take the research scripts' way: whole layers are swept and ranked."""
    exhaustive: Annotated[
        bool,
        Option(
            "'auto' evaluates every unit at every precision instead of scoring them by gradients; takes hours.",
            "What to protect",
            flag="--exhaustive/--no-exhaustive",
        ),
    ] = False
    time: Annotated[
        str | None,
        Option(
            "How long the search of 'auto' for a plan may take, such as 10min, 90s or 1h; what it cuts is said.",
            "What to protect",
            parse=parse_duration,
            metavar="DURATION",
        ),
    ] = None
    """From quantizing for the scores to the last exact evaluation. What fits into it depends on the machine's speed,
    and so does the plan."""
    sentences: Annotated[
        int | None,
        Option(
            "'auto' scores units and evaluates plans on this many sentences of each language. Default: 12, then 8.",
            "What to protect",
        ),
    ] = None
    protect_units: Annotated[
        tuple[str, ...],
        Option(
            "Parts of layers that stay in 16 bit too, as LAYER.UNIT: 3.down,5.qkv.",
            "What to protect",
            parse=parse_names,
            metavar="UNITS",
        ),
    ] = ()
    int8_layers: Annotated[
        tuple[int, ...],
        Option(
            "Layers that get 8 bits instead of --bits, such as 3,5.",
            "What to protect",
            parse=parse_int8_layers,
            metavar="LAYERS",
        ),
    ] = ()
    protect_columns: Annotated[
        float,
        Option(
            "Input channels of each quantized module in 16 bit, such as 1%; only our loader reads them.",
            "What to protect",
            parse=parse_share,
            metavar="SHARE",
        ),
    ] = 0.0
    """Share of the input channels of each quantized module that keeps 16 bit beside its integers, in a side file that
    only our own loader reads; those that matter most on the calibration text."""
    top: Annotated[
        int | None, Option("'auto' protects exactly this many layers, whatever they cost.", "What to protect")
    ] = None
    max_overhead: Annotated[
        float,
        Option(
            "Budget of 'auto': extra bytes on disk over the all-quantized checkpoint; 0.2 = 20 %.", "What to protect"
        ),
    ] = 0.2
    max_size: Annotated[
        int | None,
        Option(
            "Budget of 'auto' instead: the tensors of the whole checkpoint, such as 120MB.",
            "What to protect",
            parse=parse_max_size,
            metavar="SIZE",
        ),
    ] = None
    target_bits: Annotated[
        float | None,
        Option(
            "Budget of 'auto' instead: mean bits of a weight in the layers, scales included, such as 4.5.",
            "What to protect",
        ),
    ] = None
    target: Annotated[
        str | None,
        Option(
            "The fewest bytes instead: largest damage to accept, KL in bits per byte, such as worst=0.1.",
            "What to protect",
            parse=parse_target,
            metavar="NAME=NUMBER",
        ),
    ] = None
    limits: Annotated[
        dict[str, float] | None,
        Option(
            "Largest KL (bits per byte) of single languages beside that, such as he=0.05,zh=0.1.",
            "What to protect",
            flag="--limit",
            parse=parse_limits,
            metavar="LIST",
        ),
    ] = None
    objective: Annotated[
        str,
        Option("Damage that protection lowers, over languages:", "What to protect", metavar="NAME", names=OBJECTIVES),
    ] = "worst"
