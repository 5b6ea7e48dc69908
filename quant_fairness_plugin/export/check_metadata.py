"""Step 7, checks of metadata: would every loader, by its own rules, treat exactly the right modules as quantized?

Each check imitates one loader's rule (see the formats' docstrings for who uses which) on the names of all linear
modules, so that a list which only looks right is found: a prefix, a `.` that is a wildcard, half of a fusion group.
Plain data in, nothing out; a broken rule is an `ArtifactError` that names the module. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.formats import ModuleMap

Quantization = Mapping[str, Any]
Check = Callable[[ModuleMap, Quantization], None]


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
    checks = {"compressed-tensors": COMPRESSED_TENSORS_CHECKS, "gptq": GPTQ_CHECKS}.get(str(method))
    if checks is None:
        _fail("quant_method", f"is {method!r}", "compressed-tensors or gptq")
    for check in checks:
        check(modules, quantization)
    return f"{len(checks)} rules: {', '.join(check.__name__ for check in checks)}"


def whole_fusion_groups(modules: ModuleMap, quantization: Quantization) -> None:
    """Servers merge q, k, v and gate, up: a merged module has one precision."""
    for name in modules.split_groups:
        _fail(name, "is quantized in part", "whole fusion groups")


def pack_quantized_scheme(modules: ModuleMap, quantization: Quantization) -> None:
    """One group of int4 weights for all linear modules, already compressed, weights only."""
    _expect(quantization, {"format": "pack-quantized", "quantization_status": "compressed"})
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        _fail("config_groups", f"is {groups!r}", "exactly one group")
    [group] = groups.values()
    _expect(group, {"targets": ["Linear"], "input_activations": None, "output_activations": None})
    weights = group.get("weights") or {}
    _expect(weights, {"num_bits": 4, "type": "int", "dynamic": False})
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if (strategy, size) != ("channel", None) and (strategy != "group" or size not in (32, 64, 128)):
        _fail("strategy", f"is {strategy!r} with group_size {size!r}", "group with 32, 64 or 128, or channel without")


def no_act_order(modules: ModuleMap, quantization: Quantization) -> None:
    """Servers removed group act-order: `actorder` is null or `static`, which changes nothing at run time."""
    [group] = quantization["config_groups"].values()
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
    if quantization.get("group_size") not in (32, 64, 128, -1):
        _fail("group_size", f"is {quantization.get('group_size')!r}", "32, 64, 128 or -1")


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
    """Gptqmodel: a module of the blocks is skipped if a `-:` rule matches the beginning of its name."""
    skipped = {name for name in _in_blocks(modules) if _skipped_by_rule(name, quantization)}
    _compare("dynamic", skipped | _outside_blocks(modules), modules)


def dynamic_is_exact_for_merged_names(modules: ModuleMap, quantization: Quantization) -> None:
    """SGLang and vLLM: the same rules are asked about the merged name."""
    for name in modules.fused:
        if _skipped_by_rule(name, quantization) != (name in modules.kept_fused):
            _fail("dynamic", f"decides wrongly about the merged module {name}", "rules that match kept modules only")


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
    not_convert_has_no_trailing_dot,
    not_convert_is_exact_as_expression,
    not_convert_holds_merged_names,
)


def _compare(what: str, skipped: set[str], modules: ModuleMap) -> None:
    """`skipped` must be exactly the modules that are in 16 bit."""
    for name in sorted(skipped & set(modules.quantized)):
        _fail(what, f"leaves out {name}, which is quantized", "exactly the 16-bit modules")
    for name in sorted(set(modules.kept) - skipped):
        _fail(what, f"takes {name} for quantized, which is 16 bit", "exactly the 16-bit modules")


def _skipped_by_rule(name: str, quantization: Quantization) -> bool:
    rules = quantization.get("dynamic")
    if not isinstance(rules, dict) or not all(rule.startswith("-:") for rule in rules):
        _fail("dynamic", f"is {rules!r}", "a table of '-:' rules")
    return any(re.match(rule.removeprefix("-:"), name) for rule in rules)


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
