"""Readers, one file per loader; each is described once, by a `Reader`. Asked at plan time too; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.formats.format import Format, Quantization
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers.case import Case, ListRule, MetadataRule, contains, matches
from quant_fairness_plugin.checkpoint.readers.gptqmodel import GPTQMODEL
from quant_fairness_plugin.checkpoint.readers.reader import Reader
from quant_fairness_plugin.checkpoint.readers.sglang import SGLANG
from quant_fairness_plugin.checkpoint.readers.transformers import TRANSFORMERS
from quant_fairness_plugin.checkpoint.readers.vllm import VLLM
from quant_fairness_plugin.checkpoint.refusals import Refusal, Request, first_refusal
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.architectures.experts import find_mixture
from quant_fairness_plugin.model.families import Family

READERS: dict[str, Reader] = {reader.name: reader for reader in (TRANSFORMERS, VLLM, GPTQMODEL, SGLANG)}
OTHERS: Mapping[str, tuple[MetadataRule, ...]] = {
    "gptq": (
        ListRule("modules_to_not_convert", "as regular expression or suffix", matches("modules_to_not_convert")),
        ListRule("modules_to_not_convert", "as part of a name", contains("modules_to_not_convert")),
        ListRule("modules_to_not_convert", "as part of a merged name", contains("modules_to_not_convert"), merged=True),
    ),
}
"""How TGI and others read lists that no reader of `READERS` looks at."""
_NOTHING: Mapping[str, Precision] = MappingProxyType({})


def find_reader(name: str) -> Reader:
    """Return the reader of a given name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in READERS:
        raise ConfigError(f"unknown reader {name!r}; known are {', '.join(READERS)}. Correct --reader.")
    return READERS[name]


def takes_one_group_size(format: str, reader: str | None) -> bool:
    """Return whether a format, or a reader of it (None: any), takes one group size for all quantized modules.

    Raises:
        ConfigError: an unknown format or reader.
    """
    layout = checkpoint_format(format)
    return layout.uniform or (reader is not None and layout.name in find_reader(reader).uniform)


def check_exportable(
    family: Family | str | None,
    *,
    format: str,
    grid: Grid,
    reader: str | None = "transformers",
    overrides: Mapping[str, Precision] = _NOTHING,
    group_sizes: Collection[int] = (),
    wrapped: bool = False,
    dtype: str = "",
) -> None:
    """Refuse what no loader, or not the wanted one, would read correctly.

    Args:
        family: the model's family map or the family's name, or None while the model is not known (then its rows are
            left out).
        format: one of `FORMATS`.
        grid: the grid of the quantized modules.
        reader: the loader that must read the result, one of `READERS`; None: any.
        overrides: layers and units with a precision of their own, as in `ProtectionPlan.overrides`, or as in
            `ProtectionPlan.singled_out` where it is known which layers keep 16 bit.
        group_sizes: those of the quantized modules; none while the model is not known.
        wrapped: whether the text decoder is a part of the model; a family map says so itself.
        dtype: the 16-bit type that the model is stored in, as torch names it; empty while that is not known.

    Raises:
        ConfigError: an unknown format or reader.
        UnsupportedModelError: a combination that upstream reads wrongly or not at all; names the ways out.
    """
    refusal = find_refusal(
        family,
        format=format,
        grid=grid,
        reader=reader,
        overrides=overrides,
        group_sizes=group_sizes,
        wrapped=wrapped,
        dtype=dtype,
    )
    if refusal is not None:
        raise UnsupportedModelError(str(refusal))


def find_refusal(
    family: Family | str | None,
    *,
    format: str,
    grid: Grid,
    reader: str | None = "transformers",
    overrides: Mapping[str, Precision] = _NOTHING,
    group_sizes: Collection[int] = (),
    wrapped: bool = False,
    dtype: str = "",
) -> Refusal | None:
    """Return why a combination cannot be written and read, or None where it can; as `check_exportable`.

    Args:
        family: as for `check_exportable`, or the family's name, as in `ExportRecord.family`.
        format: the format.
        grid: the grid.
        reader: the reader.
        overrides: precisions of single layers and units.
        group_sizes: those of the quantized modules.
        wrapped: as for `check_exportable`.
        dtype: as for `check_exportable`.

    Raises:
        ConfigError: an unknown format or reader.
    """
    layout = checkpoint_format(format)
    # A plain checkpoint loads everywhere, and no reader here loads a file.
    rules = layout.rules if reader is None or not layout.packs else (*layout.rules, *find_reader(reader).rules)
    if not rules:
        return None
    name = family if family is None or isinstance(family, str) else family.name
    architecture = family.architecture if isinstance(family, Family) else find_architecture(name or "")
    scaled = None if architecture is None else architecture.scaled_activation
    request = Request(
        format=format,
        grid=grid,
        overrides=overrides,
        family=name,
        conv1d=architecture is not None and architecture.conv1d,
        head_on_disk="" if architecture is None else architecture.head_on_disk or "",
        scaled_activation="" if scaled is None else scaled.activation,
        group_sizes=frozenset(group_sizes),
        mixture=find_mixture(name or "") is not None,
        dtype=dtype,
        wrapped=wrapped or (isinstance(family, Family) and family.wrapper is not None),
    )
    return first_refusal(rules, request)


def reader_problems(case: Case) -> dict[str, str]:
    """Return what each reader would get wrong, as one sentence; empty for a reader that gets all of it right."""
    if not case.modules.quantized:
        return dict.fromkeys(READERS, "")
    cases = [replace(case, modules=view) for view in case.modules.views]
    return {
        name: next((problem for seen in cases for problem in reader.problems(seen)), "")
        for name, reader in READERS.items()
    }


def metadata_problems(
    layout: Format, modules: ModuleMap, quantization: Quantization
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every rule that metadata of our own must keep, and what breaks it.

    A folder of another tool may be right for one reader only; what is written here must be right for all of them at
    once, each list by itself: the scheme of the format, every reader's own rules, and those of other servers.

    Args:
        layout: the format.
        modules: which linear modules are quantized, judged by the tensors in the files.
        quantization: the `quantization_config`.
    """
    yield f"scheme of {layout.name}", tuple(layout.scheme_problems(modules, quantization))
    owners = {name: reader.metadata for name, reader in READERS.items()} | {"others": OTHERS}
    for owner, rules in owners.items():
        for rule in rules.get(layout.method, ()):
            broken = (problem for view in modules.views for problem in rule.problems(view, quantization))
            yield f"{owner}: {rule.label}", tuple(broken)


def check_metadata(layout: Format, modules: ModuleMap, quantization: Quantization) -> str:
    """Check that every loader would, by its own rules, treat exactly the right modules as quantized.

    Args:
        layout: the format that was written.
        modules: which linear modules are quantized, judged by the tensors in the files.
        quantization: the `quantization_config`.

    Returns:
        The names of the rules, as one sentence.

    Raises:
        ArtifactError: a rule is broken; names the module and whose rule it is.
    """
    rules = []
    for rule, broken in metadata_problems(layout, modules, quantization):
        if broken:
            raise ArtifactError(
                f"quantization_config: {broken[0]} ({rule}); every reader must find exactly the modules that are "
                "quantized. Export again."
            )
        rules.append(rule)
    return f"{len(rules)} rules: {'; '.join(rules)}"
