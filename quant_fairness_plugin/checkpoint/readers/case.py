"""Step 7, per reader: would it treat exactly those modules as quantized that the files hold quantized?

`check_metadata` holds our own exports to what every loader needs at once. Folders that other tools wrote seldom meet
that, and may still be right for one reader; so each reader's own rules are imitated here on the names of all linear
modules, and what it would get wrong is said of that reader alone. No torch.

The rules are those of Transformers 5.17 with optimum 2.3, vLLM 0.32, and gptqmodel 7.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.artifacts import Reader
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.model.families import Family

Quantization = Mapping[str, Any]
CONV1D = "Transformers loads quantized Conv1D modules (GPT-2) as garbage; --format fp16-twin loads everywhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """What the packed tensors themselves say, beyond which modules there are."""

    symmetric: bool
    """Every zero point is the middle of its range."""
    ordered: bool
    """Groups are in order in every module: no act-order that must be undone at run time."""
    wrapped_zeros: bool
    """A zero point of 0 in `gptq` version 1, stored as the largest integer."""
    missing_scales: tuple[str, ...] = ()
    """Tensors beside the activations that Transformers wants in an `awq` checkpoint of this family, and not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that the rules of a reader look at."""

    modules: ModuleMap
    family: Family
    quantization: Quantization
    facts: TensorFacts
    metadata_file: str = "config.json"
    weight_files: tuple[str, ...] = ("model.safetensors",)

    @property
    def method(self) -> str:
        """`compressed-tensors`, `gptq` or `awq`."""
        return str(self.quantization.get("quant_method"))

    @property
    def in_blocks(self) -> tuple[str, ...]:
        """Linear modules of the decoder blocks."""
        return (
            *(n for n in self.modules.quantized if n.startswith(f"{self.modules.blocks}.")),
            *self.modules.kept_in_blocks,
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear modules of the model."""
        return (*self.modules.quantized, *self.modules.kept)


def reader_problems(case: Case) -> dict[Reader, str]:
    """What each reader would get wrong, as one sentence; empty for a reader that gets all of it right."""
    rules: dict[Reader, Callable[[Case], Iterable[str]]] = {
        "transformers": _transformers,
        "vllm": _vllm,
        "gptqmodel": _gptqmodel,
    }
    if not case.modules.quantized:
        return dict.fromkeys(rules, "")
    return {reader: next(iter(rule(case)), "") for reader, rule in rules.items()}


def _transformers(case: Case) -> Iterable[str]:
    quantization = case.quantization
    yield from _misplaced_metadata(case)
    if not case.weight_files[0].startswith("model"):
        yield f"the weights are in {case.weight_files[0]}, and Transformers looks for model.safetensors"
    if case.family.conv1d:
        yield CONV1D
    if case.method == "gptq":
        yield from _wrapped(case)
        if len({case.modules.bits.get(name, quantization.get("bits")) for name in case.modules.quantized}) > 1:
            yield "modules of 4 and of 8 bits side by side, and Transformers reads one width per gptq checkpoint"
        skipped = set(case.in_blocks) - _optimum_list(case)
        yield from _compare(case, skipped, "modules_in_block_to_quantize (as suffix)", reached=case.in_blocks)
    elif case.method == "awq":
        if case.facts.missing_scales:
            yield f"{case.facts.missing_scales[0]} is missing, without which Transformers computes NaN"
        yield from _zero_point(case)
        entries = _names(quantization, "modules_to_not_convert")
        skipped = {n for n in case.linears if any(re.match(e, n) or n.endswith(e) for e in entries)}
        skipped.add(case.family.head)  # which it never converts
        what = "modules_to_not_convert (as regular expression or suffix)"
        yield from _compare(case, skipped, what, reached=case.linears)
    else:
        skipped = {name for name in case.linears if _ignored(name, quantization)}
        yield from _compare(case, skipped, "ignore", reached=case.linears)


def _vllm(case: Case) -> Iterable[str]:
    yield from _misplaced_metadata(case)
    if case.family.name == "bloom":
        yield "vLLM cannot load a quantized BLOOM in any format"
    for name in case.modules.split_groups:
        yield f"vLLM merges the parts of {name}, of which some are quantized and some are not"
    if case.method == "gptq":
        yield from _vllm_gptq_grid(case)
    elif case.method == "awq":
        yield from _zero_point(case)
    elif not case.facts.ordered:
        yield "act-order by groups, which vLLM does not read"
    skipped: set[str] = set()
    for name, parts in _merged(case).items():
        decisions = {_vllm_skips(part, case) for part in parts} if not _vllm_skips_merged(name, case) else {True}
        if len(decisions) > 1:
            yield f"the lists leave out some parts of {name}, which vLLM merges, and some not"
        skipped |= set(parts) if decisions == {True} else set()
    yield from _compare(case, skipped, "its lists, by the rules of vLLM,", reached=case.in_blocks)


def _gptqmodel(case: Case) -> Iterable[str]:
    if case.method == "compressed-tensors":
        yield from _transformers(case)  # to which gptqmodel hands these
        return
    yield from _wrapped(case)
    skipped = {name for name in case.in_blocks if _rule(name, case.quantization) is False}
    yield from _compare(case, skipped, "dynamic, the only list that gptqmodel reads,", reached=case.in_blocks)
    for name in case.modules.quantized:
        override = _rule(name, case.quantization)
        bits = override.get("bits") if isinstance(override, dict) else None
        announced = bits or case.quantization.get("bits")
        if case.modules.bits.get(name, announced) != announced:
            yield f"dynamic gives {name} {announced} bits, and it has {case.modules.bits[name]}"


def _vllm_gptq_grid(case: Case) -> Iterable[str]:
    if not case.facts.symmetric or case.quantization.get("sym") is not True:
        yield "an asymmetric gptq grid, and vLLM reads symmetric ones only"
    by_groups = case.quantization.get("group_size") != -1
    if by_groups and (case.quantization.get("desc_act") is not False or not case.facts.ordered):
        yield "act-order (desc_act), which vLLM refuses"


def _vllm_skips_merged(name: str, case: Case) -> bool:
    """Whether an entry names the merged module itself, or a rule matches it."""
    if case.method == "gptq":
        return _rule(name, case.quantization) is False
    if case.method == "awq":
        return any(entry in name for entry in _names(case.quantization, "modules_to_not_convert"))
    return False


def _vllm_skips(part: str, case: Case) -> bool:
    """Whether one unmerged module is left out. Empty lists are made up from the dtypes of the tensors."""
    if case.method == "gptq":
        entries = _names(case.quantization, "modules_in_block_to_quantize") or list(case.modules.quantized)
        return not any(entry in part for entry in entries)
    if case.method == "awq":
        entries = _names(case.quantization, "modules_to_not_convert") or list(case.modules.kept)
        return any(entry in part for entry in entries)
    return _ignored(part, case.quantization)


def _merged(case: Case) -> dict[str, tuple[str, ...]]:
    """Name in vLLM → the modules of the checkpoint that it is made of."""
    inside = {part for parts in case.modules.fused.values() for part in parts}
    return dict(case.modules.fused) | {name: (name,) for name in case.in_blocks if name not in inside}


def _optimum_list(case: Case) -> set[str]:
    """What optimum takes for quantized: everything in the blocks, unless a list of lists says which."""
    entries = case.quantization.get("modules_in_block_to_quantize")
    if entries is None:
        return set(case.in_blocks)
    lists = entries if isinstance(entries, list) and all(isinstance(names, list) for names in entries) else []
    names = tuple(str(name) for part in lists for name in part)
    return {name for name in case.in_blocks if names and name.endswith(names)}


def _ignored(name: str, quantization: Quantization) -> bool:
    """compressed-tensors: entries are full names, classes, or regular expressions after `re:`."""
    for entry in _names(quantization, "ignore"):
        pattern = entry.removeprefix("re:")
        if entry in (name, "Linear") or (pattern != entry and re.match(pattern, name)):
            return True
    return False


def _rule(name: str, quantization: Quantization) -> bool | Mapping[str, Any] | None:
    """The first rule of `dynamic` that matches: False leaves the module out, a table overrides its grid."""
    rules = quantization.get("dynamic") or {}
    for rule, override in rules.items() if isinstance(rules, dict) else ():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), name):
                return False
        elif re.match(rule.removeprefix("+:"), name):
            return override if isinstance(override, dict) else {}
    return None


def _zero_point(case: Case) -> Iterable[str]:
    if case.quantization.get("zero_point") is not True:
        yield f"zero_point is {case.quantization.get('zero_point')!r}, and awq readers expect true: the files hold them"


def _wrapped(case: Case) -> Iterable[str]:
    if case.facts.wrapped_zeros:
        yield "a zero point of 0 in gptq version 1, stored as the largest integer, which readers take for another one"


def _names(quantization: Quantization, key: str) -> list[str]:
    """A list of names, flat also where it is a list of lists; empty where it is absent."""
    flat: list[str] = []
    for entry in quantization.get(key) or ():
        flat += entry if isinstance(entry, list) else [str(entry)]
    return flat


def _misplaced_metadata(case: Case) -> Iterable[str]:
    if case.metadata_file != "config.json":
        yield f"config.json has no quantization_config; only {case.metadata_file} says how the model is quantized"


def _compare(case: Case, skipped: set[str], what: str, *, reached: Iterable[str]) -> Iterable[str]:
    """What is skipped must be exactly the 16-bit ones of the modules that the rule reaches."""
    for name in sorted(set(case.modules.quantized) - set(case.in_blocks)):
        yield f"{name} is quantized, and lies outside of the decoder blocks"
    for name in sorted(set(case.modules.kept).intersection(reached) - skipped):
        yield f"{what} takes {name} for quantized, which is 16 bit"
    for name in sorted(skipped & set(case.modules.quantized)):
        yield f"{what} leaves out {name}, which is quantized"
