"""Transformers 5.17, with optimum 2.3 and gptqmodel 7.6 for `gptq` and `awq`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata

from quant_fairness_plugin.checkpoint.formats.format import Quantization
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers.case import (
    Case,
    ListRule,
    MetadataRule,
    Scheme,
    SchemeRule,
    ignored,
    matches,
    metadata_in_config,
    no_wrapped_zeros,
    scheme_by_target,
    scheme_of_target,
    zero_points_announced,
)
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.checkpoint.refusals import TWIN, Refusal


def _not_in_block_list(quantization: Quantization, name: str) -> bool:
    """Optimum quantizes everything in the blocks, unless a list of lists says which; an entry is a suffix."""
    entries = quantization.get("modules_in_block_to_quantize")
    if entries is None:
        return False
    lists = entries if isinstance(entries, list) and all(isinstance(names, list) for names in entries) else []
    return not any(name.endswith(str(entry)) for names in lists for entry in names)


def _scheme(quantization: Quantization, modules: ModuleMap, name: str) -> Scheme:
    """The exact name of a module wins over its class."""
    return scheme_of_target(scheme_by_target(quantization), name)


UNPACKED_ZEROS = (5, 23)
"""From this version on Transformers looks for the zero points of compressed-tensors unpacked, finds them packed, and
ends with an error (run: 5.22 loads them, 5.23 does not)."""


def wants_unpacked_zeros() -> bool:
    """Return whether the installed Transformers does not load asymmetric grids of compressed-tensors."""
    major, minor = metadata.version("transformers").split(".")[:2]
    return (int(major), int(minor)) >= UNPACKED_ZEROS


BLOCK_LIST = ListRule("modules_in_block_to_quantize", "as suffix", _not_in_block_list)
NOT_CONVERT = ListRule(
    "modules_to_not_convert", "as regular expression or suffix", matches("modules_to_not_convert"), everywhere=True
)
METADATA: Mapping[str, tuple[MetadataRule, ...]] = {
    "gptq": (BLOCK_LIST,),
    "awq": (NOT_CONVERT,),
    "compressed-tensors": (
        ListRule("ignore", "by name", ignored, everywhere=True),
        SchemeRule("config_groups", _scheme),
    ),
}


def problems(case: Case) -> Iterator[str]:
    """Yield what Transformers would get wrong in a folder."""
    yield from metadata_in_config(case)
    if not case.weight_files[0].startswith("model"):
        yield f"the weights are in {case.weight_files[0]}, and Transformers looks for model.safetensors"
    if case.family.conv1d:
        yield "Transformers loads quantized Conv1D modules (GPT-2) as garbage; --format fp16-twin loads everywhere"
    if case.method == "gptq":
        yield from no_wrapped_zeros(case)
        yield from _one_width(case)
        yield from BLOCK_LIST.problems(case.modules, case.quantization)
    elif case.method == "awq":
        if case.facts.missing_scales:
            yield f"{case.facts.missing_scales[0]} is missing, without which Transformers computes NaN"
        yield from zero_points_announced(case)
        # The head is never converted.
        yield from NOT_CONVERT.problems(case.modules, case.quantization, exempt={case.family.head})
    else:
        if not case.facts.symmetric and wants_unpacked_zeros():
            yield "packed zero points of compressed-tensors, which Transformers does not load from version 5.23 on"
        for rule in METADATA["compressed-tensors"]:
            yield from rule.problems(case.modules, case.quantization)


def _one_width(case: Case) -> Iterator[str]:
    """Bits are those of the whole checkpoint, and groups are those of each module's own `g_idx` and scales (run)."""
    announced = case.quantization.get("bits")
    if len({case.modules.bits.get(name, announced) for name in case.modules.quantized}) > 1:
        yield "modules of 4 and of 8 bits side by side, and Transformers reads one width per gptq checkpoint"


TRANSFORMERS = Reader(
    name="transformers",
    metadata=METADATA,
    problems=problems,
    rules=(
        (
            lambda r: r.format == "compressed-tensors" and not r.grid.symmetric and wants_unpacked_zeros(),
            Refusal(
                "an asymmetric grid in format 'compressed-tensors' is not loaded by the installed Transformers, nor by "
                "any from 5.23 on",
                "are a symmetric grid, or another reader",
                "--sym, or --reader vllm",
            ),
        ),
        (
            lambda r: r.conv1d,
            Refusal(
                "{r.family} keeps its weights in Conv1D modules, which Transformers does not load quantized (gptq, "
                "awq) or fills with random numbers and no more than a warning (compressed-tensors)",
                "are another reader or a plain format",
                f"--reader vllm, or {TWIN}",
            ),
        ),
        (
            lambda r: r.format == "gptq" and r.int8,
            Refusal(
                "format 'gptq' says by `dynamic` rules which layers are INT8, and Transformers ignores them",
                "are the readers vllm and gptqmodel",
                "--format compressed-tensors, or --reader vllm",
            ),
        ),
    ),
    script="transformers_reader.py",
    # It reads gptq and awq through gptqmodel, so it shares gptqmodel's environment.
    modules=("gptqmodel", "optimum"),
    install="pip install torch==2.13.0 gptqmodel==7.6.0 optimum==2.3.0",
    variable="QUANT_FAIRNESS_GPTQMODEL_PYTHON",
    needs={
        "gptq": ("optimum", "gptqmodel"),
        "awq": ("gptqmodel", "accelerate"),
        "compressed-tensors": ("compressed_tensors",),
    },
)
