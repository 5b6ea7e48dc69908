"""A plan and a backend in, a `QuantizedModel` read back from what the tool wrote out.

What a tool writes is not passed on. Its integers, scales and zero points are read into the same form as ours and its
unquantized tensors are compared with the model's; from there on nothing differs: every format can be written, with our
metadata, and the record, the card, the verification and the measurement are those of any other export.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import ProtectionPlan, temporary_folder
from quant_fairness_plugin.checkpoint.dense_modules import tensor_layout
from quant_fairness_plugin.checkpoint.folder import check_headers, read_config
from quant_fairness_plugin.checkpoint.formats import FORMATS, READ_ONLY, format_of_layout
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.module_map import module_map, stored_name
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.weights import find_weights
from quant_fairness_plugin.quantize.backends import Job, backend_versions, check_backend, find_backend
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.selection import Selection, select_modules

_AGAIN = "Use --backend native, or report it to the tool."


def quantize_with(
    backend: str, loaded: LoadedModel, plan: ProtectionPlan, *, method: str, calibration: CalibrationSet
) -> QuantizedModel:
    """Quantize a model by a plan with another tool. The model in memory is not changed.

    The tool works in a temporary folder (in `TMPDIR`), which is removed.

    Args:
        backend: name of a backend, not `native`.
        loaded: the 16-bit model.
        plan: which units keep which precision; its grid is handed on.
        method: one that the backend has.
        calibration: exactly the rows that the tool gets.

    Raises:
        ConfigError: an unknown backend, or an option that it would ignore.
        MissingExtraError: the tool is not installed.
        UnsupportedModelError: the tool fails on such a model.
        ArtifactError: it quantized something else than it was asked to, or changed what it had to leave alone.
    """
    check_backend(
        backend,
        method=method,
        grid=plan.grid,
        clip=plan.grid.clip,
        weighting=calibration.weighting,
        family=loaded.family.name,
    )
    tool = find_backend(backend)
    selection = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    with temporary_folder() as work:
        out = work / "tool"
        out.mkdir()
        job = _job(loaded, selection, plan, method, calibration, work)
        tensors, folded = read_foreign(tool.quantize(job, out), loaded, job, tool=backend)
    return QuantizedModel(
        loaded=loaded,
        plan=plan,
        method=method,
        tensors=tensors,
        folded=folded,
        kept=selection.kept,
        losses={},
        damping={},
        calibration=calibration,
        backend=backend,
        versions=backend_versions(tool),
    )


def read_foreign(
    folder: Path, loaded: LoadedModel, job: Job, *, tool: str
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """What a tool wrote: the quantized modules in forward order, and the 16-bit parameters that it changed (AWQ).

    Args:
        folder: a `gptq` (version 1), `awq` (gemm) or `compressed-tensors` checkpoint.
        loaded: the 16-bit model that was quantized.
        job: what the tool was asked to do.
        tool: its name, for messages.

    Raises:
        ArtifactError: other modules, grids or shapes than asked for, a tensor that is missing or unexpected, or a
            16-bit parameter that is not the model's (outside the blocks, or at all where the method is not `awq`).
        UnsupportedModelError: a layout that is not read here.
    """
    layout = _layout(folder)
    with torch.no_grad():
        files = dict(_tensors(folder))
        marker = f".{layout.suffixes[0]}"
        packed = {name.removesuffix(marker) for name in files if name.endswith(marker)}
        for name in sorted(packed ^ set(job.grids)):
            raise _wrong(tool, name, "is quantized" if name in packed else "is in 16 bit", "the plan, module by module")
        tensors = {name: _module(name, files, layout, job, tool) for name in job.grids}
        folded = _compare_rest(files, loaded, job, tool)
    return tensors, folded


def _job(
    loaded: LoadedModel,
    selection: Selection,
    plan: ProtectionPlan,
    method: str,
    calibration: CalibrationSet,
    work: Path,
) -> Job:
    modules = module_map(loaded.model, loaded.family, selection.modules)
    shapes = {name: linear_weight(loaded.model.get_submodule(name)).shape for name in selection.modules}
    return Job(
        source=_source(loaded, work / "source"),
        dtype=str(loaded.storage_dtype).removeprefix("torch."),
        method=method,
        grid=plan.grid,
        blocks=loaded.family.blocks,
        grids=selection.grids,
        shapes={name: (shape[0], shape[1]) for name, shape in shapes.items()},
        kept=modules.kept,
        calibration=calibration,
        device=loaded.model.device.type,
    )


def _source(loaded: LoadedModel, folder: Path) -> Path:
    """The model's own folder; a copy in safetensors of one that is in memory only, in pickles, or not in 16 bit."""
    files = loaded.files
    if files.source is None and files.weights and all(path.suffix == ".safetensors" for path in files.weights):
        return files.folder
    state = {name: tensor.to(loaded.storage_dtype) for name, tensor in loaded.model.state_dict().items()}
    loaded.model.save_pretrained(folder, state_dict=state)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def _layout(folder: Path) -> Format:
    _, quantization = read_config(folder)
    layout = format_of_layout(tensor_layout(quantization or {}))
    if layout.name in READ_ONLY:
        known = ", ".join(name for name, entry in FORMATS.items() if entry.packs)
        raise ArtifactError(f"{folder}: layout {layout.name} is read and not written; needed is one of {known}.")
    return layout


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    check_headers(folder)
    for path in find_weights(folder, allow_pickle=False):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in read_header(path))


def _module(name: str, files: dict[str, Tensor], layout: Format, job: Job, tool: str) -> QuantizedTensor:
    """One module's integers; its tensors are taken out of `files`."""
    grid, dtype = job.grids[name], getattr(torch, job.dtype)
    parts = {key: files.pop(key) for key in [f"{name}.{suffix}" for suffix in layout.suffixes] if key in files}
    try:
        read = layout.read_back(name, parts, grid)
    except (KeyError, ValueError, RuntimeError) as err:
        raise ArtifactError(f"{tool}: {name}: its tensors cannot be read ({err}); {_AGAIN}") from err
    rows, cols = job.shapes[name]
    groups = 1 if grid.group_size == -1 else cols // grid.group_size
    if read.integers.shape != (rows, cols) or read.scales.shape != (rows, groups):
        problem = f"is {list(read.integers.shape)} with scales {list(read.scales.shape)}"
        raise _wrong(tool, name, problem, f"{[rows, cols]} with scales {[rows, groups]}")
    if grid.symmetric and not bool((read.zeros == 2 ** (grid.bits - 1)).all()):
        raise _wrong(tool, name, "has zero points", "a symmetric grid")
    if not torch.equal(read.scales.to(dtype).to(read.scales.dtype), read.scales):
        raise _wrong(tool, name, f"has scales in {read.scales.dtype}", f"scales that {dtype} can hold")
    return replace(read, scales=read.scales.to(dtype))


def _compare_rest(files: Mapping[str, Tensor], loaded: LoadedModel, job: Job, tool: str) -> dict[str, Tensor]:
    """Every tensor that is not packed against the model's own; returns those of the blocks that AWQ changed."""
    own: dict[str, Tensor] = loaded.model.state_dict()
    names = {stored_name(name, loaded.family): name for name in own} | {name: name for name in own}
    seen: set[str] = set()
    changed: dict[str, Tensor] = {}
    for stored, tensor in files.items():
        name = names.get(stored)
        if name is None:
            if not _harmless(stored, tensor):
                raise _wrong(tool, stored, "is an unexpected tensor", "the model's own")
            continue
        seen.add(name)
        value = tensor.to(own[name].dtype)
        if value.shape != own[name].shape:
            raise _wrong(tool, name, f"is {list(value.shape)}", f"{list(own[name].shape)}")
        if torch.equal(value, own[name].cpu()):
            continue
        if not find_method(job.method).moves_scales or not name.startswith(f"{job.blocks}."):
            raise _wrong(tool, name, "was changed", "the model's 16-bit values in everything that is not quantized")
        changed[name] = value.to(getattr(torch, job.dtype)).to(own[name])
    _check_all_there(loaded.model, seen, job, tool)
    return changed


def _harmless(name: str, tensor: Tensor) -> bool:
    """An activation scale that scales nothing, which AWQ files of some families hold."""
    return name.endswith(".scales") and bool((tensor == 1).all())


def _check_all_there(model: nn.Module, seen: set[str], job: Job, tool: str) -> None:
    """A tied tensor may be stored once, under any of its names; buffers need not be stored."""
    owners = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    packed = {f"{name}.weight" for name in job.grids}
    stored = {owners[name] for name in seen if name in owners}
    for name in sorted(model.state_dict().keys() - seen - packed):
        if owners.get(name) not in stored:
            raise _wrong(tool, name, "is missing", "all of the model's tensors")


def _wrong(tool: str, name: str, problem: str, allowed: str) -> ArtifactError:
    return ArtifactError(f"{tool}: {name} {problem}; asked was: {allowed}. {_AGAIN}")
