"""Step 7, what a checkpoint folder of any origin holds, judged by its tensors and never by what its metadata says.

`verify` and `repair` start from here where there is no `quant_fairness.json`: which linear modules are quantized, with
how many bits and groups, whether every tensor that the architecture needs is there in a fitting shape, and whether all
values can be read in one way only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from quant_fairness_kernels.packing import per_word
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.checkpoint.dense_modules import WORD_BITS, Layout, tensor_layout
from quant_fairness_plugin.checkpoint.dequantize import bare_model, extra_tensors
from quant_fairness_plugin.checkpoint.folder import (
    check_headers,
    packed_modules,
    read_config,
    read_quantization,
    weight_files,
)
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.module_map import (
    ModuleMap,
    activation_scales,
    module_map,
    own_widths,
    stored_name,
)
from quant_fairness_plugin.checkpoint.readers.case import Case, TensorFacts
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.headers import TensorShapes, read_header
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.weights import find_weights

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_ALLOWED_SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
_OPTIONAL = frozenset({"weight_zero_point", "weight_g_idx"})


@dataclass(frozen=True, slots=True)
class PackedModule:
    """The grid of one quantized module, by the shapes of its tensors."""

    cols: int
    bits: int
    groups: int

    def fits(self, group_size: int) -> bool:
        """Whether the module has as many groups as a group size gives it."""
        return self.groups == (1 if group_size == -1 else -(-self.cols // group_size))


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
    packed: Mapping[str, PackedModule]
    tensors: int
    dtype: str
    """The one dtype of all floating-point tensors, as PyTorch names it."""
    facts: TensorFacts

    @property
    def case(self) -> Case:
        """What the rules of the readers look at."""
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
    model = bare_model(folder)
    family = detect_family(model)
    names = packed_modules(shapes, quantization)
    extra = extra_tensors(shapes, names, model)
    packed = {name: _packed_module(name, model, shapes, layout) for name in sorted(names)}
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
        modules=module_map(model, family, packed, bits={name: module.bits for name, module in packed.items()}),
        packed=packed,
        tensors=len(shapes),
        dtype=_one_dtype({name: kind for name, (kind, _) in shapes.items() if name not in extra}),
        facts=_read_values(folder, layout, packed, _missing_scales(model, layout, shapes)),
    )


def _packed_module(name: str, model: PreTrainedModel, shapes: TensorShapes, layout: Layout | None) -> PackedModule:
    """Check the tensors of one quantized module against the architecture."""
    assert layout is not None
    try:
        rows, cols = linear_weight(model.get_submodule(name)).shape
    except (AttributeError, TypeError) as err:
        raise ArtifactError(
            f"{name} is quantized in the weight files, and the architecture has no such linear module; allowed are its "
            "own. Get the config.json that belongs to these files."
        ) from err
    own = {suffix: shapes.get(f"{name}.{suffix}") for suffix in _ALLOWED_SUFFIXES[layout]}
    for suffix, found in own.items():
        if found is None and suffix not in _OPTIONAL:
            raise ArtifactError(f"missing tensors: {name}.{suffix}. Get the files again.")
    dimensions = {suffix: found[1] for suffix, found in own.items() if found is not None}
    module = _grid(name, layout, dimensions, rows, cols)
    for suffix, expected in _expected_shapes(layout, module, rows).items():
        if suffix in dimensions and dimensions[suffix] != expected:
            raise ArtifactError(
                f"{name}.{suffix} is {dimensions[suffix]}, expected {expected} for {module.bits} bits in "
                f"{module.groups} groups. Get the files again."
            )
    return module


def _grid(name: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]], rows: int, cols: int) -> PackedModule:
    """Bits from how many words the integers take, groups from the scales."""
    if layout == "compressed-tensors":
        words, integers, groups = shapes["weight_packed"][-1], cols, shapes["weight_scale"][-1]
    elif layout == "awq":
        words, integers, groups = shapes["qweight"][-1], rows, shapes["scales"][0]
    else:
        words, integers, groups = shapes["qweight"][0], cols, shapes["scales"][0]
    widths = (4,) if layout == "awq" else (4, 8)
    for bits in widths:
        if -(-integers * bits // WORD_BITS) == words and 0 < groups <= cols:
            return PackedModule(cols=cols, bits=bits, groups=groups)
    raise ArtifactError(
        f"{name}: its packed tensor has {words} words for {integers} integers in {groups} groups; allowed are "
        f"{' or '.join(map(str, widths))} bits. Get the config.json that belongs to these files."
    )


def _expected_shapes(layout: Layout, module: PackedModule, rows: int) -> dict[str, tuple[int, ...]]:
    cols, groups = module.cols, module.groups

    def words(count: int) -> int:
        return -(-count * module.bits // WORD_BITS)

    if layout == "compressed-tensors":
        return {
            "weight_packed": (rows, words(cols)),
            "weight_scale": (rows, groups),
            "weight_shape": (2,),
            "weight_zero_point": (words(rows), groups),
            "weight_g_idx": (cols,),
        }
    qweight = (cols, words(rows)) if layout == "awq" else (words(cols), rows)
    return {"qweight": qweight, "qzeros": (groups, words(rows)), "scales": (groups, rows), "g_idx": (cols,)}


def _check_complete(model: PreTrainedModel, family: Family, packed: Mapping[str, Any], present: set[str]) -> None:
    """Every tensor of the architecture is there, and nothing else is."""
    parameters = dict(model.named_parameters())  # a tied parameter comes once
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = [name for name in model.state_dict() if name.removesuffix(".weight") not in packed]
    present = {stored_name(name, family) if name in state else name for name in present}  # tools name heads both ways
    expected = {stored_name(name, family) for name in state}
    needed = {stored_name(name, family) for name in state if name in parameters or name not in every}
    known = {f"{name}.{suffix}" for name in packed for suffixes in _ALLOWED_SUFFIXES.values() for suffix in suffixes}
    for problem, names in (("missing", needed - present), ("unexpected", present - expected - known)):
        if names:
            raise ArtifactError(
                f"{problem} tensors: {', '.join(sorted(names)[:5])} ({len(names)} in all); the files must hold exactly "
                "the model's. Get the files again."
            )


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


def _missing_scales(model: PreTrainedModel, layout: Layout | None, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(activation_scales(model, "awq").keys() - set(names))) if layout == "awq" else ()


def _read_values(
    folder: Path, layout: Layout | None, packed: Mapping[str, PackedModule], missing_scales: tuple[str, ...]
) -> TensorFacts:
    """Look at every value once, one tensor in memory at a time."""
    symmetric = ordered = True
    wrapped = False
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in read_header(path):
                tensor = file.get_tensor(name)
                module, _, suffix = name.rpartition(".")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    _fail(f"{path}: {name} holds NaN or infinite values")
                if module not in packed:
                    continue
                grid = packed[module]
                if suffix in ("g_idx", "weight_g_idx"):
                    ordered &= _in_order(name, tensor, grid)
                elif suffix in ("qzeros", "weight_zero_point"):
                    zeros, low = _fields(tensor, grid.bits), int(layout == "gptq")
                    symmetric &= bool((zeros == 2 ** (grid.bits - 1) - low).all())
                    wrapped |= layout == "gptq" and bool((zeros == 2**grid.bits - 1).any())
    return TensorFacts(symmetric=symmetric, ordered=ordered, wrapped_zeros=wrapped, missing_scales=missing_scales)


def _in_order(name: str, groups: Tensor, grid: PackedModule) -> bool:
    if int(groups.min()) < 0 or int(groups.max()) >= grid.groups:
        _fail(f"{name} names groups {int(groups.min())} to {int(groups.max())}, and there are {grid.groups}")
    size = -(-grid.cols // grid.groups)
    return bool((groups == torch.arange(grid.cols) // size).all())


def _fields(words: Tensor, bits: int) -> Tensor:
    return torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, WORD_BITS, bits)])


def _fail(problem: str) -> NoReturn:
    raise ArtifactError(f"{problem}. Get the files again.")


_STORAGE = {"F16": "float16", "BF16": "bfloat16"}


TensorKinds = dict[str, tuple[str | None, tuple[int, ...]]]
"""Tensor name → (dtype, or None where it is the storage dtype; shape)."""


def modules_by_tensors(model: nn.Module, family: Family, shapes: TensorShapes, record: ExportRecord) -> ModuleMap:
    """Which modules the files hold quantized, after checking that these are the recorded ones.

    Raises:
        ArtifactError: the record names other modules.
    """
    markers = () if record.format == "fp16-twin" else (f".{checkpoint_format(record.format).suffixes[0]}",)
    found = {name.removesuffix(marker) for marker in markers for name in shapes if name.endswith(marker)}
    expected = set(record.quantized_modules) if markers else set()
    for name in sorted(found ^ expected):
        raise ArtifactError(
            f"{name} is {'quantized' if name in found else '16 bit'} in the weight files and not in the record; they "
            "must agree. Export again."
        )
    return module_map(model, family, found, bits=own_widths(record.quantized_modules, record.plan.grid))


def check_tensor_list(
    model: nn.Module, family: Family, modules: ModuleMap, shapes: TensorShapes, record: ExportRecord, dtype: str
) -> str:
    """The files hold exactly the model's tensors, with the shapes and dtypes of the format and one storage dtype.

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
    for problem, names in (
        ("missing", expected.keys() - shapes.keys()),
        ("unexpected", shapes.keys() - expected.keys()),
    ):
        if names:
            raise ArtifactError(
                f"{problem} tensors: {', '.join(sorted(names)[:5])} ({len(names)} in all). Export again."
            )
    storage = next((name for name, text in _STORAGE.items() if text == dtype), None)
    if storage is None:
        raise ArtifactError(f"config.json says dtype {dtype!r}; allowed are {list(_STORAGE.values())}. Export again.")
    for name, (kind, shape) in expected.items():
        if shapes[name] != (kind or storage, shape):
            raise ArtifactError(f"{name} is {shapes[name]}, expected {(kind or storage, shape)}. Export again.")
    return f"{len(expected)} tensors, {dtype}"


def check_values(folder: Path, record: ExportRecord) -> str:
    """Every float is finite; for gptq, groups are in order; zero points of a symmetric grid are those of one.

    Raises:
        ArtifactError: a value that no loader would report; names the tensor.
    """
    for path in find_weights(folder, allow_pickle=False):
        with safe_open(path, framework="pt") as file:
            for name in read_header(path):
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ArtifactError(f"{path}: {name} holds NaN or infinite values. Export again.")
                _check_zero_points(name, tensor, record)
                if record.format == "gptq":
                    _check_gptq(name, tensor)
    return "all finite"


def _check_zero_points(name: str, tensor: torch.Tensor, record: ExportRecord) -> None:
    """Symmetric grids: every zero point is the middle, which gptq stores minus one."""
    module = name.removesuffix(".qzeros")
    if module == name or not record.plan.grid.symmetric:
        return
    bits = record.quantized_modules[module]
    stored = 2 ** (bits - 1) - (record.format == "gptq")
    fields = torch.stack([(tensor >> shift) & (2**bits - 1) for shift in range(0, 32, bits)])
    if not bool((fields == stored).all()):
        raise ArtifactError(
            f"{name}: not the zero points of a symmetric grid, which the record says it is (vLLM reads gptq files only "
            "so). Export again."
        )


def _check_gptq(name: str, tensor: torch.Tensor) -> None:
    if name.endswith(".g_idx") and bool((tensor.diff() < 0).any()):
        raise ArtifactError(f"{name}: groups are permuted (act-order), which vLLM refuses. Export again.")


def _expected_tensors(model: nn.Module, family: Family, modules: ModuleMap, record: ExportRecord) -> TensorKinds:
    parameters = dict(model.named_parameters())  # a tied parameter comes once
    own = {name for name in model.state_dict() if name in parameters or name not in _all_parameters(model)}
    kinds: dict[torch.dtype, str] = {torch.bool: "BOOL", torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32"}
    expected: TensorKinds = {
        stored_name(name, family): (kinds.get(tensor.dtype), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name in own and name.removesuffix(".weight") not in set(modules.quantized)
    }
    for module in modules.quantized:
        rows, cols = linear_weight(model.get_submodule(module)).shape
        expected |= _packed_tensors(module, rows, cols, record)
    return expected | {name: (None, (length,)) for name, length in activation_scales(model, record.format).items()}


def _all_parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _packed_tensors(module: str, rows: int, cols: int, record: ExportRecord) -> TensorKinds:
    grid, count = record.plan.grid, per_word(record.quantized_modules[module])
    groups = 1 if grid.group_size == -1 else cols // grid.group_size
    if record.format == "gptq":
        return {
            f"{module}.qweight": ("I32", (cols // count, rows)),
            f"{module}.qzeros": ("I32", (groups, rows // count)),
            f"{module}.scales": (None, (groups, rows)),
            f"{module}.g_idx": ("I32", (cols,)),
        }
    if record.format == "awq":
        return {
            f"{module}.qweight": ("I32", (cols, rows // count)),
            f"{module}.qzeros": ("I32", (groups, rows // count)),
            f"{module}.scales": (None, (groups, rows)),
        }
    expected: TensorKinds = {
        f"{module}.weight_packed": ("I32", (rows, -(-cols // count))),
        f"{module}.weight_scale": (None, (rows, groups)),
        f"{module}.weight_shape": ("I64", (2,)),
    }
    if not grid.symmetric:
        expected[f"{module}.weight_zero_point"] = ("I32", (-(-rows // count), groups))
    return expected
