"""What the rules of readers look at, and how readers look names up in the lists of the metadata. No torch.

Every loader decides by lists of its own which modules are quantized. Each is imitated here on the names of all linear
modules, so that a list which only looks right is seen: a prefix, a `.` that is a wildcard, half of a fusion group, an
8-bit layer that a reader would unpack as 4-bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from quant_fairness_plugin.checkpoint.formats.format import Quantization
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS
from quant_fairness_plugin.model.families import Family

Scheme = tuple[object, object]
"""Bits and group size as metadata says them, whatever their types; None where it says nothing."""


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
    """A checkpoint folder, as far as the rules of a reader look at it."""

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


@dataclass(frozen=True, slots=True)
class ListRule:
    """One list of the metadata, as a reader looks names up in it: which modules it leaves in 16 bit."""

    key: str
    how: str
    skips: Callable[[Quantization, str], bool]
    """Whether a module of that name is left in 16 bit."""
    merged: bool = False
    """Whether the reader looks up the names of merged modules."""
    everywhere: bool = False
    """Whether the reader looks up modules outside of the decoder blocks too."""

    @property
    def label(self) -> str:
        """The list and its reading, for messages."""
        return f"{self.key} ({self.how})"

    def problems(
        self, modules: ModuleMap, quantization: Quantization, *, exempt: Collection[str] = ()
    ) -> Iterator[str]:
        """Yield every module that this reading of the list gets wrong, but those that the reader never quantizes."""
        if self.merged:
            yield from self._merged_problems(modules, quantization)
            return
        reached = (*modules.quantized, *modules.kept) if self.everywhere else in_blocks(modules)
        skipped = {name for name in reached if self.skips(quantization, name)}
        yield from compare(modules, skipped.union(exempt), self.label, reached=reached)

    def _merged_problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        for name in modules.fused:
            skipped = self.skips(quantization, name)
            if skipped and name not in modules.kept_fused:
                yield f"{self.label} leaves out the merged module {name}, which is quantized"
            if not skipped and name in modules.kept_fused:
                yield f"{self.label} takes the merged module {name} for quantized, which is 16 bit"


@dataclass(frozen=True, slots=True)
class SchemeRule:
    """How a reader finds the bits and the group size of a quantized module in the metadata."""

    key: str
    scheme: Callable[[Quantization, ModuleMap, str], Scheme]
    """The bits and the group size that a module of that name gets; None where the metadata says nothing of it."""
    merged: bool = False
    """Whether the reader looks up the names of merged modules, where it merges some."""

    @property
    def label(self) -> str:
        """The field and whose names are looked up, for messages."""
        return f"{self.key} (bits and groups of {'merged' if self.merged else 'unmerged'} modules)"

    def problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield every module that gets other bits or another group size than it is stored with."""
        quantized = set(modules.quantized)
        merged = [name for name, parts in by_server_name(modules).items() if quantized.issuperset(parts)]
        for name in merged if self.merged else modules.quantized:
            bits, size = self.scheme(quantization, modules, name)
            first = modules.fused.get(name, (name,))[0]
            stored = modules.bits.get(first, STORED_BITS)
            if bits is not None and bits != stored:
                yield f"{self.key} gives {name} {bits} bits, and it has {stored}"
            if size is not None and size != modules.sizes.get(first, size):
                yield f"{self.key} gives {name} group size {size}, and it has {modules.sizes[first]}"


@dataclass(frozen=True, slots=True)
class WholeGroups:
    """Servers merge q, k, v and gate, up, so that a merged module has one precision."""

    server: str

    @property
    def label(self) -> str:
        """What must hold, for messages."""
        return "whole fusion groups"

    def problems(self, modules: ModuleMap, quantization: Quantization) -> Iterator[str]:
        """Yield every merged module that is stored otherwise."""
        for name in modules.split_groups:
            yield f"{self.server} merges the parts of {name}, which is quantized in part, or with several widths"


MetadataRule = ListRule | SchemeRule | WholeGroups


def in_blocks(modules: ModuleMap) -> tuple[str, ...]:
    """Return the linear modules of the decoder blocks."""
    return (*(name for name in modules.quantized if name.startswith(f"{modules.blocks}.")), *modules.kept_in_blocks)


def by_server_name(modules: ModuleMap) -> dict[str, tuple[str, ...]]:
    """Return the modules of the blocks as servers know them: name → the modules of the checkpoint in it."""
    inside = {part for parts in modules.fused.values() for part in parts}
    return dict(modules.fused) | {name: (name,) for name in in_blocks(modules) if name not in inside}


def compare(modules: ModuleMap, skipped: Collection[str], what: str, *, reached: Iterable[str]) -> Iterator[str]:
    """Yield every module that is wrongly skipped, or wrongly not, of those that a rule reaches."""
    for name in sorted(set(modules.quantized) - set(in_blocks(modules))):
        yield f"{name} is quantized, and lies outside of the decoder blocks"
    for name in sorted(set(modules.kept).intersection(reached).difference(skipped)):
        yield f"{what} takes {name} for quantized, which is 16 bit"
    for name in sorted(set(modules.quantized).intersection(skipped)):
        yield f"{what} leaves out {name}, which is quantized"


def server_problems(
    case: Case,
    server: str,
    *,
    skips_merged: Callable[[str], bool],
    skips_part: Callable[[str], bool],
) -> Iterator[str]:
    """Yield what a server gets wrong that looks a merged name up first, and then for each of its parts.

    Args:
        case: the checkpoint.
        server: its name, for messages.
        skips_merged: whether an entry leaves the whole merged module in 16 bit.
        skips_part: whether one unmerged module is left in 16 bit.
    """
    skipped: set[str] = set()
    for name, parts in by_server_name(case.modules).items():
        decisions = {True} if skips_merged(name) else {skips_part(part) for part in parts}
        if len(decisions) > 1:
            yield f"the lists leave out some parts of {name}, which {server} merges, and some not"
        skipped |= set(parts) if decisions == {True} else set()
    yield from compare(case.modules, skipped, f"the metadata, as {server} reads it,", reached=in_blocks(case.modules))


def metadata_in_config(case: Case) -> Iterator[str]:
    """Yield that the metadata is in another file than the one that loaders read first."""
    if case.metadata_file != "config.json":
        yield f"config.json has no quantization_config; only {case.metadata_file} says how the model is quantized"


def no_wrapped_zeros(case: Case) -> Iterator[str]:
    """Yield that a zero point of 0 is stored as the largest integer."""
    if case.facts.wrapped_zeros:
        yield "a zero point of 0 in gptq version 1, stored as the largest integer, which readers take for another one"


def zero_points_announced(case: Case) -> Iterator[str]:
    """Yield that the metadata of an `awq` checkpoint denies its zero points."""
    if case.quantization.get("zero_point") is not True:
        yield f"zero_point is {case.quantization.get('zero_point')!r}, and awq readers expect true: the files hold them"


def names_in(quantization: Quantization, key: str) -> list[str]:
    """Return a list of names, flat also where it is a list of lists; empty where it is absent."""
    flat: list[str] = []
    for entry in quantization.get(key) or ():
        flat += entry if isinstance(entry, list) else [str(entry)]
    return flat


def contains(key: str) -> Callable[[Quantization, str], bool]:
    """Return the reading of a list of skipped modules: an entry is a part of a module's name."""
    return lambda quantization, name: any(entry in name for entry in names_in(quantization, key))


def matches(key: str) -> Callable[[Quantization, str], bool]:
    """Return the reading of a list of skipped modules: a regular expression at a name's beginning, or a suffix."""
    return lambda quantization, name: any(
        re.match(entry, name) or name.endswith(entry) for entry in names_in(quantization, key)
    )


def ignored(quantization: Quantization, name: str) -> bool:
    """Return whether `ignore` names a module: in full, by its class, or by a regular expression after `re:`."""
    for entry in names_in(quantization, "ignore"):
        pattern = entry.removeprefix("re:")
        if entry in (name, "Linear") or (pattern != entry and re.match(pattern, name)):
            return True
    return False


def dynamic_rule(quantization: Quantization, name: str) -> bool | Mapping[str, object] | None:
    """Return the first rule of `dynamic` that matches: False leaves the module out, a table overrides its grid."""
    rules = quantization.get("dynamic") or {}
    for rule, override in rules.items() if isinstance(rules, dict) else ():
        if rule.startswith("-:"):
            if re.match(rule.removeprefix("-:"), name):
                return False
        elif re.match(rule.removeprefix("+:"), name):
            return override if isinstance(override, dict) else {}
    return None


def skipped_by_rule(quantization: Quantization, name: str) -> bool:
    """Return whether the first rule of `dynamic` that matches leaves the module out."""
    return dynamic_rule(quantization, name) is False


def scheme_by_rule(quantization: Quantization, modules: ModuleMap, name: str) -> Scheme:
    """Return the bits and the group size that `dynamic` gives a module, else those of the whole checkpoint."""
    override = dynamic_rule(quantization, name)
    table = override if isinstance(override, Mapping) else {}
    return table.get("bits") or quantization.get("bits"), table.get("group_size") or quantization.get("group_size")


def scheme_by_target(quantization: Quantization) -> dict[str, Scheme]:
    """Return the scheme of each target of `config_groups`: module name, class name or `re:` pattern → scheme."""
    groups = quantization.get("config_groups")
    schemes: dict[str, Scheme] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else ():
            weights = group.get("weights") or {}
            size = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
            schemes[target] = (weights.get("num_bits"), size)
    return schemes


def scheme_of_target(schemes: Mapping[str, Scheme], name: str) -> Scheme:
    """Return the scheme that a name gets: as a target of its own, by a pattern, or as a `Linear`, in this order."""
    patterns = (target for target in schemes if target.startswith("re:") and re.match(target[3:], name))
    return schemes.get(name if name in schemes else next(patterns, "Linear"), (None, None))


def float_bits(quantization: Quantization) -> set[object]:
    """Return the bits of those weights of `config_groups` that are floats; empty where there are none."""
    groups = quantization.get("config_groups")
    tables = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else []
    return {weights.get("num_bits") for weights in tables if weights.get("type") == "float"}


RULES_OF_MERGED: tuple[MetadataRule, ...] = (
    ListRule("dynamic", "of merged names", skipped_by_rule, merged=True),
    SchemeRule("dynamic", scheme_by_rule, merged=True),
)
"""How servers read `dynamic`."""
