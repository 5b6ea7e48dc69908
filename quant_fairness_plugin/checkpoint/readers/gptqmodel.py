"""gptqmodel 7.6. It reads `dynamic` alone, and hands `compressed-tensors` to Transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quant_fairness_plugin.checkpoint.readers import transformers
from quant_fairness_plugin.checkpoint.readers.case import (
    Case,
    ListRule,
    MetadataRule,
    SchemeRule,
    float_bits,
    no_wrapped_zeros,
    scheme_by_rule,
    skipped_by_rule,
)
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS, TWIN, Refusal

DYNAMIC = ListRule("dynamic", "the only list that gptqmodel reads", skipped_by_rule)
SCHEMES = SchemeRule("dynamic", scheme_by_rule)
FP4 = "gptqmodel was run in float16, in which Transformers unpacks FP4 into bfloat16 beside it"
METADATA: Mapping[str, tuple[MetadataRule, ...]] = {"gptq": (DYNAMIC, SCHEMES), "awq": (DYNAMIC,)}


def problems(case: Case) -> Iterator[str]:
    """Yield what gptqmodel would get wrong in a folder."""
    if case.method == "compressed-tensors":
        if STORED_BITS in float_bits(case.quantization):
            yield f"{FP4}, and fails"
        yield from transformers.problems(case)
        return
    yield from no_wrapped_zeros(case)
    for rule in (DYNAMIC, SCHEMES):
        yield from rule.problems(case.modules, case.quantization)


GPTQMODEL = Reader(
    name="gptqmodel",
    metadata=METADATA,
    problems=problems,
    rules=(
        (
            lambda r: r.floats and r.grid.bits == STORED_BITS,
            Refusal(
                f"{FP4}, and fails (scheme '{{r.grid.scheme}}')",
                "is reader transformers, or scheme fp8",
                f"--reader transformers, --scheme fp8, or {TWIN}",
            ),
        ),
        (
            lambda r: r.mixture,
            Refusal(
                "gptqmodel was not run on quantized experts, such as those of {r.family}",
                "are readers transformers and vllm",
                f"--reader transformers, or {TWIN}",
            ),
        ),
        (
            lambda r: r.conv1d and r.format == "compressed-tensors",
            Refusal(
                "gptqmodel hands format 'compressed-tensors' to Transformers, which fills the Conv1D modules of "
                "{r.family} with random numbers and gives no more than a warning",
                "is gptq",
                f"--format gptq, --reader vllm, or {TWIN}",
            ),
        ),
        (
            lambda r: bool(r.head_on_disk) and r.format in ("gptq", "awq"),
            Refusal(
                "gptqmodel leaves the head of {r.family} uninitialised: checkpoints of this family call it "
                "{r.head_on_disk}, and gptqmodel looks for lm_head",
                "are another reader, or compressed-tensors",
                "--format compressed-tensors, or --reader transformers",
            ),
        ),
    ),
    script="gptqmodel_reader.py",
    modules=("gptqmodel",),
    install="pip install torch==2.13.0 gptqmodel==7.6.0",
    variable="QUANT_FAIRNESS_GPTQMODEL_PYTHON",
)
