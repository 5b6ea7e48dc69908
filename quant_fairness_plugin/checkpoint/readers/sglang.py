"""Step 7, checks of metadata: would every loader, by its own rules, treat exactly the right modules as quantized?

Each check imitates one loader's rule (see the formats' docstrings for who uses which) on the names of all linear
modules, so that a list which only looks right is found: a prefix, a `.` that is a wildcard, half of a fusion group, an
8-bit layer that a reader would unpack as 4-bit.
Plain data in, nothing out; a broken rule is an `ArtifactError` that names the module. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.errors import ArtifactError

Quantization = Mapping[str, Any]
Check = Callable[[ModuleMap, Quantization], None]
GRID_BITS = 4
"""Bits of every quantized module that `ModuleMap.bits` does not name."""
OWN_BITS = 8
"""The only other width that single modules can have."""


def check_metadata(modules: ModuleMap, quantization: Quantization) -> str:
    """Run every check of the format that the metadata names.

    Args:
        modules: which linear modules are quantized, judged by the tensors in the files.
        quantization: the `quantization_config`.

    Returns:
        The names of the checks, as one sentence.

    Raises:
        ArtifactError: a rule is broken, or the format is not one of ours.
    """
    method = quantization.get("quant_method")
    checks = CHECKS.get(str(method))
    if checks is None:
        _fail("quant_method", f"is {method!r}", ", ".join(CHECKS))
    for check in checks:
        check(modules, quantization)
    return f"{len(checks)} rules: {', '.join(check.__name__ for check in checks)}"


def whole_fusion_groups(modules: ModuleMap, quantization: Quantization) -> None:
    """Servers merge q, k, v and gate, up: a merged module has one precision."""
    for name in modules.split_groups:
        _fail(name, "is quantized in part, or with several widths", "whole fusion groups")


def pack_quantized_scheme(modules: ModuleMap, quantization: Quantization) -> None:
    """One group of int4 weights for all linear modules, and one of int8 for named ones; compressed, weights only."""
    _expect(quantization, {"format": "pack-quantized", "quantization_status": "compressed"})
    *others, last = _groups(quantization)
    _expect(last, {"targets": ["Linear"]})
    if len(others) > 1 or any("Linear" in group.get("targets", []) for group in others):
        _fail("config_groups", f"holds {1 + len(others)} groups", "one for names, and after it one for Linear")
    for group, bits in ((last, GRID_BITS), *((group, OWN_BITS) for group in others)):
        _expect(group, {"format": "pack-quantized", "input_activations": None, "output_activations": None})
        weights = group.get("weights") or {}
        _expect(weights, {"num_bits": bits, "type": "int", "dynamic": False})
        shape = weights.get("strategy"), weights.get("group_size")
        if shape != ("channel", None) and (shape[0] != "group" or shape[1] not in (32, 64, 128)):
            _fail("strategy", f"is {shape[0]!r} with group_size {shape[1]!r}", "group of 32, 64 or 128, or channel")


def targets_are_exact(modules: ModuleMap, quantization: Quantization) -> None:
    """Transformers: the exact name of a module wins over its class. Any other target would match nothing, unseen."""
    widths = _widths_by_target(quantization)
    for name in widths.keys() - {"Linear", *modules.quantized}:
        _fail("targets", f"hold {name!r}, which is no quantized module", "full names of unmerged modules")
    for name in modules.quantized:
        _compare_width("config_groups", name, widths.get(name, widths["Linear"]), modules)


def targets_are_exact_for_merged_names(modules: ModuleMap, quantization: Quantization) -> None:
    """vLLM: a merged module takes a group if each of its parts is named in some group, and then that of the first."""
    widths = _widths_by_target(quantization)
    for merged, parts in modules.fused.items():
        if set(parts) <= set(modules.quantized):
            named = widths[parts[0]] if set(parts) <= widths.keys() else widths["Linear"]
            _compare_width("config_groups", merged, widths.get(merged, named), modules)


def no_act_order(modules: ModuleMap, quantization: Quantization) -> None:
    """Servers removed group act-order: `actorder` is null or `static`, which changes nothing at run time."""
    for group in _groups(quantization):
        order = (group.get("weights") or {}).get("actorder")
        if order not in (None, "static"):
            _fail("actorder", f"is {order!r}", "null or 'static'")


def ignore_holds_full_names(modules: ModuleMap, quantization: Quantization) -> None:
    """Every entry is the full name of one linear module: no pattern, no prefix, no merged name, no trailing dot."""
    known = {*modules.kept, *modules.aliases, *modules.quantized}
    for entry in _names(quantization, "ignore"):
        if entry not in known:
            _fail("ignore", f"holds {entry!r}, which is no linear module", "full names of unmerged modules")


def ignore_is_exact(modules: ModuleMap, quantization: Quantization) -> None:
    """Transformers and vLLM: ignored is what is listed, no more and no less than the 16-bit modules."""
    listed = set(_names(quantization, "ignore"))
    _compare("ignore", listed, modules)
    for name in sorted(set(modules.aliases) - listed):
        _fail("ignore", f"lacks {name}, another name of a 16-bit module", "every name of the 16-bit modules")


def ignore_is_exact_as_substring(modules: ModuleMap, quantization: Quantization) -> None:
    """SGLang: an entry also ignores every module whose name contains it, in any case."""
    entries = [entry.lower() for entry in _names(quantization, "ignore")]
    skipped = {name for name in _all(modules) if any(entry in name.lower() for entry in entries)}
    _compare("ignore (as substring)", skipped, modules)


def gptq_scheme(modules: ModuleMap, quantization: Quantization) -> None:
    """The fields without which a loader guesses, with the only values that all of them read."""
    _expect(quantization, {"bits": 4, "sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": False})
    _expect_group_size(quantization)


def block_list_is_exact_as_suffix(modules: ModuleMap, quantization: Quantization) -> None:
    """Optimum: a list of lists; a module is quantized if its name ends with an entry."""
    entries = _block_list(quantization)
    done = {name for name in _all(modules) if any(name.endswith(entry) for entry in entries)}
    _compare("modules_in_block_to_quantize (as suffix)", set(_all(modules)) - done, modules)


def block_list_is_exact_as_substring(modules: ModuleMap, quantization: Quantization) -> None:
    """vLLM: a module is quantized if its name contains an entry; merged modules by their parts."""
    entries = _block_list(quantization)
    done = {name for name in _all(modules) if any(entry in name for entry in entries)}
    _compare("modules_in_block_to_quantize (as substring)", set(_all(modules)) - done, modules)


def dynamic_is_exact(modules: ModuleMap, quantization: Quantization) -> None:
    """Gptqmodel: the first rule that matches the beginning of a module's name decides; `-:` skips the module."""
    skipped = {name for name in _in_blocks(modules) if _width_by_rule(name, quantization) is None}
    _compare("dynamic", skipped | _outside_blocks(modules), modules)


def dynamic_is_exact_for_merged_names(modules: ModuleMap, quantization: Quantization) -> None:
    """SGLang and vLLM: the same rules are asked about the merged name."""
    for name in modules.fused:
        if (_width_by_rule(name, quantization) is None) != (name in modules.kept_fused):
            _fail("dynamic", f"decides wrongly about the merged module {name}", "rules that match kept modules only")


def dynamic_widths_are_exact(modules: ModuleMap, quantization: Quantization) -> None:
    """The same readers take the bits of a module from a `+:` rule, asked about its own or its merged name."""
    busy = [name for name, parts in modules.fused.items() if set(parts) <= set(modules.quantized)]
    for name in (*modules.quantized, *busy):
        _compare_width("dynamic", name, _width_by_rule(name, quantization), modules)


def awq_scheme(modules: ModuleMap, quantization: Quantization) -> None:
    """The only layout that all readers of `awq` have in common: 4-bit gemm with zero points."""
    expected = {"bits": 4, "zero_point": True, "version": "gemm", "desc_act": False, "lm_head": False}
    _expect(quantization, expected)
    _expect_group_size(quantization)
    for name, bits in modules.bits.items():
        _fail(name, f"has {bits} bits", "4 bits in awq")


def not_convert_is_exact_everywhere(modules: ModuleMap, quantization: Quantization) -> None:
    """Transformers, `awq`: as for gptq, but modules outside the blocks would be converted too (the head excepted)."""
    entries = _names(quantization, "modules_to_not_convert")
    skipped = {name for name in _all(modules) if any(re.match(e, name) or name.endswith(e) for e in entries)}
    _compare("modules_to_not_convert", skipped, modules)


def not_convert_is_exact_as_substring(modules: ModuleMap, quantization: Quantization) -> None:
    """SGLang, TGI and (`awq`) vLLM: an entry is a substring of a module's name."""
    entries = _names(quantization, "modules_to_not_convert")
    skipped = {name for name in _in_blocks(modules) if any(entry in name for entry in entries)}
    _compare("modules_to_not_convert (as substring)", skipped | _outside_blocks(modules), modules)


def not_convert_has_no_trailing_dot(modules: ModuleMap, quantization: Quantization) -> None:
    """As a regular expression `layers.1.` is also the beginning of `layers.10`."""
    for entry in _names(quantization, "modules_to_not_convert"):
        if entry.endswith("."):
            _fail("modules_to_not_convert", f"holds {entry!r}", "full names without a trailing dot")


def not_convert_is_exact_as_expression(modules: ModuleMap, quantization: Quantization) -> None:
    """Transformers: an entry is a regular expression at the beginning of a name, or a suffix."""
    entries = _names(quantization, "modules_to_not_convert")
    skipped = {name for name in _in_blocks(modules) if any(re.match(e, name) or name.endswith(e) for e in entries)}
    _compare("modules_to_not_convert", skipped | _outside_blocks(modules), modules)


def not_convert_holds_merged_names(modules: ModuleMap, quantization: Quantization) -> None:
    """SGLang: an entry is a substring of the merged name, and parts are not expanded."""
    entries = _names(quantization, "modules_to_not_convert")
    for name in modules.fused:
        if any(entry in name for entry in entries) != (name in modules.kept_fused):
            _fail("modules_to_not_convert", f"decides wrongly about {name}", "merged names of kept modules too")


COMPRESSED_TENSORS_CHECKS: tuple[Check, ...] = (
    whole_fusion_groups,
    pack_quantized_scheme,
    targets_are_exact,
    targets_are_exact_for_merged_names,
    no_act_order,
    ignore_holds_full_names,
    ignore_is_exact,
    ignore_is_exact_as_substring,
)
GPTQ_CHECKS: tuple[Check, ...] = (
    whole_fusion_groups,
    gptq_scheme,
    block_list_is_exact_as_suffix,
    block_list_is_exact_as_substring,
    dynamic_is_exact,
    dynamic_is_exact_for_merged_names,
    dynamic_widths_are_exact,
    not_convert_has_no_trailing_dot,
    not_convert_is_exact_as_expression,
    not_convert_is_exact_as_substring,
    not_convert_holds_merged_names,
)
AWQ_CHECKS: tuple[Check, ...] = (
    whole_fusion_groups,
    awq_scheme,
    dynamic_is_exact,
    not_convert_has_no_trailing_dot,
    not_convert_is_exact_everywhere,
    not_convert_is_exact_as_substring,
    not_convert_holds_merged_names,
)
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "compressed-tensors": COMPRESSED_TENSORS_CHECKS,
    "gptq": GPTQ_CHECKS,
    "awq": AWQ_CHECKS,
}
"""The rules of each `quant_method`."""


def _compare(what: str, skipped: set[str], modules: ModuleMap) -> None:
    """`skipped` must be exactly the modules that are in 16 bit."""
    for name in sorted(skipped & set(modules.quantized)):
        _fail(what, f"leaves out {name}, which is quantized", "exactly the 16-bit modules")
    for name in sorted(set(modules.kept) - skipped):
        _fail(what, f"takes {name} for quantized, which is 16 bit", "exactly the 16-bit modules")


def _compare_width(what: str, name: str, found: object, modules: ModuleMap) -> None:
    """`found` must be the bits of a quantized module, or of the parts of a merged one."""
    stored = modules.bits.get(modules.fused.get(name, (name,))[0], GRID_BITS)
    if found != stored:
        _fail(what, f"gives {name} {found} bits, and it has {stored}", "the bits in which a module is stored")


def _groups(quantization: Quantization) -> list[Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        _fail("config_groups", f"is {groups!r}", "a table of groups")
    return list(groups.values())


def _widths_by_target(quantization: Quantization) -> dict[str, Any]:
    groups = _groups(quantization)
    widths = {target: (group.get("weights") or {}).get("num_bits") for group in groups for target in group["targets"]}
    return {"Linear": None} | widths


def _width_by_rule(name: str, quantization: Quantization) -> int | None:
    """Bits that `dynamic` gives a module; None where it skips it."""
    rules = quantization.get("dynamic")
    if not isinstance(rules, dict):
        _fail("dynamic", f"is {rules!r}", "a table of rules")
    for rule, change in rules.items():
        if (rule[:2], change) not in (("-:", {}), ("+:", {"bits": OWN_BITS})):
            _fail("dynamic", f"holds {rule!r}: {change!r}", f"'-:' rules, and '+:' rules that say bits {OWN_BITS}")
    matching = [rule for rule in rules if re.match(rule[2:], name)]
    if not matching:
        return GRID_BITS
    return None if matching[0].startswith("-:") else OWN_BITS


def _expect_group_size(quantization: Quantization) -> None:
    if quantization.get("group_size") not in (32, 64, 128, -1):
        _fail("group_size", f"is {quantization.get('group_size')!r}", "32, 64, 128 or -1")


def _block_list(quantization: Quantization) -> list[str]:
    lists = quantization.get("modules_in_block_to_quantize")
    if not isinstance(lists, list) or not all(isinstance(names, list) for names in lists):
        _fail("modules_in_block_to_quantize", f"is {type(lists).__name__}", "a list of lists of full names")
    return [str(name) for names in lists for name in names]


def _names(quantization: Quantization, key: str) -> list[str]:
    names = quantization.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _fail(key, f"is {names!r}", "a list of names")
    return names


def _all(modules: ModuleMap) -> tuple[str, ...]:
    return (*modules.quantized, *modules.kept)


def _in_blocks(modules: ModuleMap) -> tuple[str, ...]:
    return (*modules.quantized, *modules.kept_in_blocks)


def _outside_blocks(modules: ModuleMap) -> set[str]:
    return set(modules.kept) - set(modules.kept_in_blocks)


def _expect(table: Quantization, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if key not in table or table[key] != value or type(table[key]) is not type(value):
            _fail(key, f"is {table.get(key, 'missing')!r}", f"{value!r}")


def _fail(what: str, problem: str, allowed: str) -> NoReturn:
    raise ArtifactError(f"quantization_config: {what} {problem}; allowed: {allowed}. Export again.")
