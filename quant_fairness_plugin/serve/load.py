"""Loading for serving: an exported folder in, a Transformers model that runs out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from quant_fairness_kernels.int4_matmul import Columns
from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE, check_fit, read_columns
from quant_fairness_plugin.checkpoint.dequantize import Checkpoint, load_dense_model, model_from_state, open_checkpoint
from quant_fairness_plugin.checkpoint.folder import RECORD, load_record
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.serve.fusing import Prepared, launches, put_fused, reason_against_fusing
from quant_fairness_plugin.serve.kernels import DTYPES, Choice, Kernel, choose_kernel
from quant_fairness_plugin.serve.linear import check_protected, put_dense, put_module
from quant_fairness_plugin.serve.planes import SIXTEEN_BIT, reason_against, stored_planes

_logger = logging.getLogger(__name__)


def load_quantized(
    folder: str | Path, *, kernel: Kernel = "auto", dtype: torch.dtype | None = None, fuse: bool | None = None
) -> PreTrainedModel:
    """Load any of our exports, GPT-2 included, without another package's quantization code.

    Reads only files of the folder, and checks neither checksums nor metadata (`verify` does). Quantized modules become
    `QuantizedLinear`, with the input channels that `quant_fairness_columns.safetensors` keeps in 16 bit; protected ones
    stay plain 16-bit modules, and it is checked that they are. A quantized module that no kernel computes with is
    dequantized to `dtype` and said so in the log: 8-bit ones (the kernels have 4), and in the folders of other tools
    groups that are no multiple of 32, uneven act-order groups and scaled activations.

    Memory: on a GPU 0.5 byte per 4-bit weight; on a CPU 2 to 2.5, more than in the file (see `QuantizedLinear`).

    Args:
        folder: a checkpoint folder written by `export`.
        kernel: `triton` (NVIDIA GPU), `cpu`, `auto` (the first of these that runs here; float32 takes the reference),
            or `reference`, which dequantizes every module to float32 once and runs dense: exact, and as slow and as
            large as the unquantized model in 32 bit.
        dtype: of activations and protected modules: float16, bfloat16 or float32. None is the stored one for `triton`,
            bfloat16 for `cpu` (a float16 checkpoint is rounded), float32 for `reference`.
        fuse: compute q, k and v in one launch, and gate and up in another (see `fusing`); those with different
            act-order permutations stay apart, and the log says so. None is yes for `triton`, no for the others.

    Returns:
        The model in evaluation mode, on the GPU for `triton` and else on the CPU.

    Raises:
        ConfigError: an unknown kernel or type, a kernel that cannot run here (says what is missing), or `fuse` with the
            reference, which has no launches to fuse.
        ArtifactError: files that are missing or malformed, do not hold exactly the model's tensors, or hold other
            modules quantized than the folder's record says.
        UnsupportedModelError: a quantization method that is not ours, or a protected module that is not plain.
    """
    choice = choose_kernel(kernel, dtype)
    folder = Path(folder)
    columns = read_columns(folder)
    if choice.kernel == "reference":
        if fuse:
            raise ConfigError("fuse has no effect on kernel 'reference', which runs dense. Leave it out, or use 'cpu'.")
        return _with_columns(load_dense_model(folder), folder, columns)
    checkpoint = open_checkpoint(folder)
    _check_record(folder, checkpoint)
    _check_columns(folder, checkpoint, columns)
    if choice.dtype is None:
        stored = checkpoint.bare.config.dtype
        choice = choice._replace(dtype=stored if stored in SIXTEEN_BIT else torch.float16)
    assert choice.dtype is not None  # by now
    with torch.no_grad():
        model, dense = _build(
            folder, checkpoint, choice, columns, fuse=choice.kernel == "triton" if fuse is None else fuse
        )
        plain = check_protected(model, dtype=choice.dtype, replaced=checkpoint.packed)
        model.requires_grad_(False)
        model.to(choice.device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    quantized = len(checkpoint.packed) - dense
    _logger.info("%s: %d modules by %s, %d dequantized, %d plain", folder, quantized, choice.kernel, dense, plain)
    return model


@torch.no_grad()
def _with_columns(model: PreTrainedModel, folder: Path, columns: Mapping[str, KeptColumns]) -> PreTrainedModel:
    """A dense float32 model, with what the side file adds to its weights."""
    for name, extra in columns.items():
        weight = linear_weight(model.get_submodule(name))
        check_fit(folder, name, extra, tuple(weight.shape))
        weight.index_add_(1, extra.index.long(), extra.delta.to(weight))
    return model


def _check_columns(folder: Path, checkpoint: Checkpoint, columns: Mapping[str, KeptColumns]) -> None:
    """Channels are added to what a quantized module computes; there must be such a module, and it must have them."""
    for name, extra in columns.items():
        if name not in checkpoint.packed:
            raise ArtifactError(f"{folder / COLUMNS_FILE}: {name} is no quantized module. Export again.")
        check_fit(folder, name, extra, tuple(linear_weight(checkpoint.bare.get_submodule(name)).shape))


def _build(
    folder: Path, checkpoint: Checkpoint, choice: Choice, columns: Mapping[str, KeptColumns], *, fuse: bool
) -> tuple[PreTrainedModel, int]:
    """The model with its quantized modules in place, and how many of these were dequantized instead."""
    assert choice.dtype is not None  # resolved by the caller
    model = model_from_state(folder, checkpoint.bare, _state(checkpoint, choice.dtype), dtype=choice.dtype)
    dtype, on_cpu, dense = choice.dtype, choice.kernel == "cpu", 0
    for names in launches(checkpoint.bare, checkpoint.packed, fuse=fuse):
        ready = {name: _prepare(model, name, checkpoint, choice, columns.get(name)) for name in names}
        parts = {name: part for name, part in ready.items() if part is not None}
        dense += len(names) - len(parts)
        reason = reason_against_fusing(list(parts.values())) if len(parts) > 1 else None
        if len(parts) > 1 and reason is None:
            put_fused(model, parts, dtype=dtype, on_cpu=on_cpu)
            continue
        if reason is not None:
            _logger.info("%s are computed apart: %s", ", ".join(parts), reason)
        for name, part in parts.items():
            put_module(model, name, part.linear(dtype=dtype, on_cpu=on_cpu))
    return model, dense


def _prepare(
    model: PreTrainedModel, name: str, checkpoint: Checkpoint, choice: Choice, extra: KeptColumns | None
) -> Prepared | None:
    """One module for the kernels; where they cannot compute it, it is put into the model dense, and None comes back."""
    assert choice.dtype is not None  # resolved by the caller
    parts = checkpoint.parts(name)
    reason = "its activations are scaled" if name in checkpoint.input_scales else None
    reason = reason or reason_against(parts, checkpoint.layout)
    if reason is not None:
        _logger.info("%s is dequantized: %s", name, reason)
        weight = checkpoint.dense(name)
        put_dense(model, name, weight if extra is None else extra.added_to(weight), dtype=choice.dtype)
        return None
    planes = stored_planes(parts, checkpoint.layout, dtype=None if choice.kernel == "cpu" else choice.dtype)
    bias = model.get_submodule(name).bias
    assert bias is None or isinstance(bias, Tensor)
    return Prepared(planes, bias, _columns(extra))


def _columns(extra: KeptColumns | None) -> Columns | None:
    """Kept channels as the kernels take them."""
    return None if extra is None else Columns(extra.index, extra.delta.t().contiguous())


def _state(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the model; quantized weights are one zero each, seen as a whole matrix, until they are replaced.

    Raises:
        ArtifactError: a weight that is stored as something else than a number of 16 or 32 bits.
    """
    state = {}
    for name in checkpoint.plain:
        tensor = checkpoint.tensor(name)
        if name.endswith(".weight") and tensor.dtype not in DTYPES:
            raise ArtifactError(f"{name} is protected, and stored as {tensor.dtype}; 16 bit is needed. Export again.")
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name in checkpoint.packed:
        module = checkpoint.bare.get_submodule(name)
        rows, cols = linear_weight(module).shape
        shape = (cols, rows) if is_conv1d(module) else (rows, cols)
        state[f"{checkpoint.stored_name(name)}.weight"] = torch.zeros((), dtype=dtype).expand(shape)
    return state


def _check_record(folder: Path, checkpoint: Checkpoint) -> None:
    """A module that the record protects must not be quantized in the files, nor the other way round."""
    if not (folder / RECORD).is_file():
        return
    record = load_record(folder)
    expected = set() if record.format == "fp16-twin" else set(record.quantized_modules)
    for name in sorted(expected ^ set(checkpoint.packed)):
        stored = "quantized" if name in checkpoint.packed else "in 16 bit"
        raise ArtifactError(f"{folder}: {name} is stored {stored}, and the record says otherwise. Export again.")
