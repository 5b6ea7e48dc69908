"""SGLang, by its documented rules: it has no CPU build that installs beside the others, and is not run here.

Source: `sglang/srt/layers/quantization` (`gptq.py`, `awq.py`, `compressed_tensors/utils.py`). `gptq` looks the merged
name up in `dynamic`; `awq` looks for an entry in the merged name, and does not try its parts; `compressed-tensors`
tries the parts, and takes an entry of `ignore` for a part of a name, in any case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from quant_fairness_plugin.checkpoint.formats.format import Quantization
from quant_fairness_plugin.checkpoint.readers.case import (
    RULES_OF_MERGED,
    Case,
    ListRule,
    MetadataRule,
    SchemeRule,
    WholeGroups,
    contains,
    float_bits,
    metadata_in_config,
    names_in,
    scheme_by_target,
    server_problems,
    skipped_by_rule,
)
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.checkpoint.refusals import TWIN, Refusal


def _ignored(quantization: Quantization, name: str) -> bool:
    for entry in names_in(quantization, "ignore"):
        if re.match(entry[3:], name) if entry.startswith("re:") else entry.lower() in name.lower():
            return True
    return False


METADATA: Mapping[str, tuple[MetadataRule, ...]] = {
    "gptq": (WholeGroups("SGLang"), *RULES_OF_MERGED),
    "awq": (
        WholeGroups("SGLang"),
        ListRule("modules_to_not_convert", "as part of a merged name", contains("modules_to_not_convert"), merged=True),
    ),
    "compressed-tensors": (
        WholeGroups("SGLang"),
        ListRule("ignore", "as part of a name, in any case", _ignored, everywhere=True),
    ),
}


def problems(case: Case) -> Iterator[str]:
    """Yield what SGLang would get wrong in a folder."""
    yield from metadata_in_config(case)
    yield from WholeGroups("SGLang").problems(case.modules, case.quantization)
    quantization = case.quantization
    skips: Callable[[Quantization, str], bool]
    if case.method == "gptq":
        skips = skipped_by_rule
    elif case.method == "awq":
        skips = contains("modules_to_not_convert")
    else:
        skips = _ignored
        yield from _compressed_tensors_problems(case)
    by_parts = case.method == "compressed-tensors"
    yield from server_problems(
        case,
        "SGLang",
        skips_merged=lambda name: not by_parts and skips(quantization, name),
        skips_part=lambda name: by_parts and skips(quantization, name),
    )
    for rule in METADATA.get(case.method, ()):
        if isinstance(rule, SchemeRule):
            yield from rule.problems(case.modules, quantization)


def _compressed_tensors_problems(case: Case) -> Iterator[str]:
    if float_bits(case.quantization):
        yield "weights in FP8 or FP4 alone: SGLang's rules for these are not known here"
    if not case.facts.ordered:
        yield "act-order by groups, which SGLang does not read"
    widths = {case.modules.bits.get(name) for name in case.modules.quantized}
    if len(widths) > 1 and case.modules.fused:
        yield "modules of 4 and of 8 bits side by side, and SGLang gives a merged one the bits of its class"
    _, size = scheme_by_target(case.quantization).get("Linear", (None, None))
    for name, parts in case.modules.fused.items():
        if case.modules.sizes.get(parts[0], size) != size:
            yield f"{name} has another group size than its class, which SGLang looks at first"


SGLANG = Reader(
    name="sglang",
    metadata=METADATA,
    problems=problems,
    rules=(
        (
            lambda r: r.floats,
            Refusal(
                "SGLang's rules for scheme '{r.grid.scheme}' are not known here",
                "are readers transformers and vllm",
                f"--reader transformers, or {TWIN}",
            ),
        ),
        (
            lambda r: r.mixture,
            Refusal(
                "SGLang was not run on quantized experts, such as those of {r.family}",
                "are readers transformers and vllm",
                f"--reader transformers, or {TWIN}",
            ),
        ),
        (
            lambda r: r.format == "compressed-tensors" and r.int8,
            Refusal(
                "SGLang gives a merged module the group of its class before that of its parts, and would unpack INT8 "
                "layers of format 'compressed-tensors' as 4 bit",
                "is gptq",
                "--format gptq, or --reader vllm",
            ),
        ),
        (
            lambda r: r.format == "compressed-tensors" and r.several_sizes,
            Refusal(
                "SGLang gives a merged module the group of its class before that of its parts, and would take a wrong "
                "group size in format 'compressed-tensors'",
                "is gptq",
                "--group-size {r.smallest_size} for a plan of one size, --format gptq, or --reader vllm",
            ),
        ),
    ),
    uniform=frozenset({"compressed-tensors"}),
)
