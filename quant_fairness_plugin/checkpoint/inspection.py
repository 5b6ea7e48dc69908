"""What a checkpoint folder holds, judged by its tensors and never by what its metadata says.

`inspect_checkpoint` looks at folders of any origin: which linear modules are quantized, with how many bits and groups,
whether every tensor that the architecture needs is there, and whether all values can be read in one way only. The other
functions compare a folder that was written here with its record. Shapes are those of the `Format` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.checkpoint.dense_modules import MARKERS, Layout, tensor_layout
from quant_fairness_plugin.checkpoint.dequantize import bare_model, extra_tensors, quantized_modules
from quant_fairness_plugin.checkpoint.experts import with_stacks
from quant_fairness_plugin.checkpoint.folder import (
    check_headers,
    packed_modules,
    read_config,
    read_quantization,
    weight_files,
)
from quant_fairness_plugin.checkpoint.formats import FORMATS, checkpoint_format, format_of_layout, stored_format
from quant_fairness_plugin.checkpoint.formats.format import Format, StoredGrid, TensorKind
from quant_fairness_plugin.checkpoint.module_map import ModuleMap, module_map, own_widths, stored_name
from quant_fairness_plugin.checkpoint.readers.case import (
    Case,
    TensorFacts,
    scheme_by_rule,
    scheme_by_target,
    scheme_of_target,
)
from quant_fairness_plugin.checkpoint.values import read_values
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.headers import TensorShapes
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.unread import roots, sort_names
from quant_fairness_plugin.quantize.grid_rules import group_count

STORED_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
"""Group sizes that tools write."""
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
STORAGE = {"float16": "F16", "bfloat16": "BF16"}
"""dtype as `config.json` names it → as safetensors writes it."""
OTHER_KINDS = {torch.bool: "BOOL", torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32"}
_AGAIN = "Get the files again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint folder holds."""

    folder: Path
    config: Mapping[str, Any]
    """`config.json` without the quantization metadata."""
    quantization: Mapping[str, Any]
    """The metadata as it stands; empty for a plain checkpoint."""
    source: str
    """The file that holds the metadata."""
    weights: tuple[str, ...]
    """Names of the weight files."""
    layout: Layout | None
    model: PreTrainedModel
    """The unquantized architecture, on the meta device."""
    family: Family
    modules: ModuleMap
    packed: Mapping[str, StoredGrid]
    tensors: int
    dtype: str
    """The one dtype of all floating-point tensors, as PyTorch names it."""
    facts: TensorFacts

    @property
    def case(self) -> Case:
        """The folder, as far as the rules of the readers look at it."""
        return Case(
            modules=self.modules,
            family=self.family,
            quantization=self.quantization,
            facts=self.facts,
            metadata_file=self.source,
            weight_files=self.weights,
        )

    @property
    def announced_dtype(self) -> str:
        """The dtype that `config.json` names; the tensors' own where it names none."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or self.dtype)


def inspect_checkpoint(folder: Path) -> Inspection:
    """Look at every tensor of a checkpoint folder.

    Args:
        folder: one that any tool wrote: ours, gptqmodel, AutoRound, AutoGPTQ, AutoAWQ, llm-compressor, or a plain one.

    Raises:
        ArtifactError: tensors that are missing, too many, of another shape, of mixed dtypes, or not finite.
        UnsupportedModelError: a quantization method, layout or architecture that is not read here.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; expected a checkpoint folder. Check the path.")
    config, _ = read_config(folder)
    shapes = check_headers(folder)
    quantization, source = read_quantization(folder)
    layout = tensor_layout(quantization) if quantization else None
    if layout is not None:
        _check_packed(folder, layout, shapes)
    form = checkpoint_format("fp16-twin") if layout is None else format_of_layout(layout)
    model = bare_model(folder)
    family = detect_family(model)
    names = {family.loaded_name(name) for name in packed_modules(shapes, quantization)}
    kinds = sort_names(model, family, shapes)
    extra = (*extra_tensors(shapes.keys() - set(kinds.copied), names, model), *kinds.copied)
    packed = {name: _stored_grid(name, model, family, shapes, form) for name in sorted(names)}
    _check_complete(model, family, packed, shapes.keys() - set(extra))
    return Inspection(
        folder=folder,
        config=config,
        quantization=quantization,
        source=source,
        weights=tuple(path.name for path in weight_files(folder)),
        layout=layout,
        model=model,
        family=family,
        modules=_module_map(model, family, quantization, packed, roots(kinds.own, kinds.unread)),
        packed=packed,
        tensors=len(shapes),
        dtype=_one_dtype({name: kind for name, (kind, _) in shapes.items() if name not in extra}),
        facts=_facts(folder, form, family, packed, missing=form.added_tensors(model).keys() - shapes.keys()),
    )


def _module_map(
    model: PreTrainedModel,
    family: Family,
    quantization: Mapping[str, Any],
    packed: Mapping[str, StoredGrid],
    unread: Collection[str],
) -> ModuleMap:
    """Return which modules are quantized, with their bits, and their group sizes where these can be told."""
    bits = {name: module.bits for name, module in packed.items()}
    modules = module_map(model, family, packed, bits=bits, unread=unread)
    sizes = {name: _group_size(name, module, quantization, modules) for name, module in packed.items()}
    known = {name: size for name, size in sizes.items() if size is not None}
    return replace(modules, sizes=known)


def _group_size(name: str, module: StoredGrid, quantization: Mapping[str, Any], modules: ModuleMap) -> int | None:
    """Return the group size that metadata gives a module where it fits, else the smallest that does; None: none does.

    Scales alone leave a choice: 64 input channels in one group are one group of 64, of 128, or all of a row.
    """
    _, by_rule = scheme_by_rule(quantization, modules, name)
    _, by_target = scheme_of_target(scheme_by_target(quantization), name)
    stated = [size for size in (by_rule, by_target, quantization.get("group_size")) if type(size) is int]
    sizes = [size for size in (*stated, *STORED_SIZES) if size == -1 or size > 0]
    return next((size for size in sizes if module.fits(size)), None)


def modules_by_tensors(model: PreTrainedModel, family: Family, shapes: TensorShapes, record: ExportRecord) -> ModuleMap:
    """Return which modules the files hold quantized, after checking that these are the recorded ones.

    Raises:
        ArtifactError: the record names other modules.
    """
    form = stored_format(record.format, record.plan.grid)
    marker = f".{form.suffixes[0]}" if form.packs else None
    stored = {name.removesuffix(marker) for name in shapes if name.endswith(marker)} if marker else set()
    packed = {family.loaded_name(name) for name in stored}
    recorded = set(record.quantized_modules) if form.packs else set()
    for name in sorted(packed ^ recorded):
        raise ArtifactError(
            f"{name} is {'quantized' if name in packed else '16 bit'} in the weight files and not in the record; they "
            "must agree. Export again."
        )
    kinds = sort_names(model, family, shapes)
    bits = own_widths(record.quantized_modules)
    unread = roots(kinds.own, kinds.unread)
    return module_map(model, family, packed, bits=bits, sizes=record.sizes, unread=unread)


def check_tensor_list(
    model: PreTrainedModel, family: Family, modules: ModuleMap, shapes: TensorShapes, record: ExportRecord, dtype: str
) -> str:
    """Check that files hold exactly the model's tensors, with the format's shapes and dtypes and one storage dtype.

    Args:
        model: the unquantized architecture, on any device.
        family: its family map.
        modules: which modules are quantized.
        shapes: the headers of the weight files.
        record: what the export recorded.
        dtype: the dtype that `config.json` announces.

    Raises:
        ArtifactError: a tensor that is missing or unexpected, or has another dtype or shape; names it.
    """
    expected = _expected_tensors(model, family, modules, record)
    copied = {name: shapes[name] for name in record.copied_tensors if name in shapes}
    _check_names(record.copied_tensors.keys() - copied.keys(), set(), "Export again.")
    shapes = {name: kind for name, kind in shapes.items() if name not in copied}
    _check_names(expected.keys() - shapes.keys(), shapes.keys() - expected.keys(), "Export again.")
    storage = STORAGE.get(dtype)
    if storage is None:
        raise ArtifactError(f"config.json says dtype {dtype!r}; allowed: {', '.join(STORAGE)}. Export again.")
    for name, (kind, shape) in expected.items():
        if shapes[name] != (kind or storage, shape):
            raise ArtifactError(f"{name} is {shapes[name]}, expected {(kind or storage, shape)}. Export again.")
    return f"{len(expected)} tensors, {dtype}" + (f", and {len(copied)} of the source" if copied else "")


def check_values(folder: Path, record: ExportRecord) -> str:
    """Check that every float is finite, groups are in order, and zero points are those of the recorded grid.

    Raises:
        ArtifactError: a value that no loader would report; names the tensor.
    """
    grid, form = record.plan.grid, stored_format(record.format, record.plan.grid)
    family = detect_family(bare_model(folder))
    widths = {family.stored_name(name): bits for name, bits in record.quantized_modules.items()}
    for values in read_values(folder, form, widths):
        if values.name in record.copied_tensors:
            continue
        if not values.finite:
            raise ArtifactError(f"{values.where} holds NaN or infinite values. Export again.")
        if grid.symmetric and not values.symmetric:
            raise ArtifactError(
                f"{values.name}: not the zero points of a symmetric grid, which the record says it is (vLLM reads gptq "
                "files only so). Export again."
            )
        if values.groups is not None and bool((values.groups.diff() < 0).any()):
            raise ArtifactError(f"{values.name}: groups are permuted (act-order), which vLLM refuses. Export again.")
    return "all finite"


def _check_packed(folder: Path, layout: Layout, shapes: TensorShapes) -> None:
    """Refuse modules that `dense_modules` reads, and whose tensors no format of ours describes."""
    marker = ".weight_packed" if layout == "compressed-tensors" else ".qweight"
    packed = {name.removesuffix(marker) for name, (kind, _) in shapes.items() if name.endswith(marker) and kind != "U8"}
    others = [name for name in quantized_modules(shapes, MARKERS[layout]) if name not in packed]
    if others:
        raise UnsupportedModelError(
            f"{folder}: {others[0]} and {len(others) - 1} others hold no packed integers; such folders are measured "
            "and compared, and not verified, repaired or swept. Use quant-fairness measure"
        )


def _stored_grid(name: str, model: PreTrainedModel, family: Family, shapes: TensorShapes, form: Format) -> StoredGrid:
    """Check the tensors of one quantized module against the architecture."""
    try:
        rows, cols = linear_weight(model.get_submodule(name)).shape
    except (AttributeError, TypeError) as err:
        raise ArtifactError(
            f"{name} is quantized in the weight files, and the architecture has no such linear module; accepted are "
            "its own. Get the config.json that belongs to these files."
        ) from err
    prefix = f"{family.stored_name(name)}."
    present = {key.removeprefix(prefix): shape for key, (_, shape) in shapes.items() if key.startswith(prefix)}
    try:
        grid = form.grid(present, rows, cols)
    except KeyError as err:
        raise ArtifactError(f"missing tensors: {name}.{err.args[0]}. {_AGAIN}") from err
    except ValueError as err:
        raise ArtifactError(f"{name}: {err}. Get the config.json that belongs to these files.") from err
    for suffix, (_, expected) in form.shapes(grid).items():
        if suffix not in present and suffix not in form.optional:
            raise ArtifactError(f"missing tensors: {name}.{suffix}. {_AGAIN}")
        if present.get(suffix, expected) != expected:
            raise ArtifactError(
                f"{name}.{suffix} is {present[suffix]}, expected {expected} for {grid.bits} bits in "
                f"{grid.groups} groups. {_AGAIN}"
            )
    return grid


def _state_names(model: nn.Module, family: Family, packed: Collection[str]) -> tuple[dict[str, Tensor], set[str]]:
    """The 16-bit tensors of a text model, and the names of those that files must hold: a tied parameter comes once."""
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    whole = {name: value for name, value in model.state_dict().items() if family.owns(name)}
    state = {name: value for name, value in whole.items() if name.removesuffix(".weight") not in packed}
    state = with_stacks(model, state, packed)
    return state, {name for name in state if name in once or name not in every}


def _check_complete(model: PreTrainedModel, family: Family, packed: Collection[str], present: set[str]) -> None:
    """Every tensor of the architecture is there, and nothing else is."""
    state, needed = _state_names(model, family, packed)
    present = {stored_name(name, family) if name in state else name for name in present}  # tools name heads both ways
    suffixes = {suffix for entry in FORMATS.values() for suffix in (*entry.suffixes, *entry.optional)}
    known = {f"{stored_name(name, family)}.{suffix}" for name in packed for suffix in suffixes}
    known |= {stored_name(name, family) for name in state}
    missing = {stored_name(name, family) for name in needed} - present
    _check_names(missing, present - known, f"The files must hold exactly the model's. {_AGAIN}")


def _check_names(missing: set[str], unexpected: set[str], advice: str) -> None:
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ArtifactError(f"{problem} tensors: {', '.join(sorted(names)[:5])} ({len(names)} in all). {advice}")


def _expected_tensors(
    model: PreTrainedModel, family: Family, modules: ModuleMap, record: ExportRecord
) -> dict[str, TensorKind]:
    form, grid, sizes = stored_format(record.format, record.plan.grid), record.plan.grid, record.sizes
    state, needed = _state_names(model, family, modules.quantized)
    expected: dict[str, TensorKind] = {
        stored_name(name, family): (OTHER_KINDS.get(tensor.dtype), tuple(tensor.shape))
        for name, tensor in state.items()
        if name in needed
    }
    for module in modules.quantized:
        rows, cols = linear_weight(model.get_submodule(module)).shape
        groups = group_count(replace(grid, group_size=sizes[module]), cols)
        stored = StoredGrid(rows, cols, record.quantized_modules[module], groups)
        kinds = form.expected(stored, symmetric=grid.symmetric)
        expected |= {f"{stored_name(module, family)}.{suffix}": kind for suffix, kind in kinds.items()}
    return expected | {name: (None, (length,)) for name, length in form.added_tensors(model).items()}


def _one_dtype(kinds: Mapping[str, str]) -> str:
    """The dtype that all floating-point tensors share."""
    examples = {kind: name for name, kind in kinds.items() if kind in FLOATS}
    if len(examples) > 1:
        raise ArtifactError(
            f"mixed dtypes: {', '.join(f'{name} is {kind}' for kind, name in sorted(examples.items()))}; allowed is "
            "one for all. The tensors would have to change; quantize again with one dtype (gptqmodel: "
            "dtype=torch.float16 in GPTQModel.load)."
        )
    return FLOATS[next(iter(examples))] if examples else "float16"


def _facts(
    folder: Path, form: Format, family: Family, packed: Mapping[str, StoredGrid], *, missing: set[str]
) -> TensorFacts:
    """What the values say of the whole checkpoint."""
    symmetric = ordered = True
    wrapped = False
    grids = {stored_name(name, family): grid for name, grid in packed.items()}
    for values in read_values(folder, form, {name: grid.bits for name, grid in grids.items()}):
        if not values.finite:
            raise ArtifactError(f"{values.where} holds NaN or infinite values. {_AGAIN}")
        symmetric &= values.symmetric
        wrapped |= values.wrapped
        if values.groups is not None:
            ordered &= _in_order(values.name, values.groups, grids[values.name.rpartition(".")[0]])
    return TensorFacts(
        symmetric=symmetric, ordered=ordered, wrapped_zeros=wrapped, missing_scales=tuple(sorted(missing))
    )


def _in_order(name: str, groups: Tensor, grid: StoredGrid) -> bool:
    if int(groups.min()) < 0 or int(groups.max()) >= grid.groups:
        raise ArtifactError(
            f"{name} names groups {int(groups.min())} to {int(groups.max())}, and there are {grid.groups}. {_AGAIN}"
        )
    size = -(-grid.cols // grid.groups)
    return bool((groups == torch.arange(grid.cols) // size).all())
