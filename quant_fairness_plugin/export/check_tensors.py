"""Step 7, checks of tensors: exactly the model's, in the dtypes and shapes that loaders expect, with finite values."""

from __future__ import annotations

from pathlib import Path

import torch
from quant_fairness_kernels.packing import per_word
from safetensors import safe_open
from torch import nn

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.contents import activation_scales, module_map, own_widths, stored_name
from quant_fairness_plugin.export.formats import ModuleMap, checkpoint_format
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.headers import TensorShapes, read_header
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.weights import find_weights

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
