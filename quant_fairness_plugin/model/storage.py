"""The 16-bit values: in which dtype a model is stored, and its parameters rounded to exactly that."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.resolve import ModelFiles, tensor_shapes

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def storage_dtype(files: ModelFiles) -> torch.dtype:
    """Return the 16-bit dtype of a checkpoint: that of most of its values.

    Where these have 32 bits or more, it is the one that the config says (in which Transformers and servers would load
    them), and float16 where it says none of 16 bits.

    Raises:
        UnsupportedModelError: the checkpoint holds no values of 16, 32 or 64 bits.
        ArtifactError: pickled weights that cannot be read.
    """
    sizes = Counter[torch.dtype]()
    if files.weights[0].suffix == ".safetensors":
        for name, shape in tensor_shapes(files).values():
            if name in _FLOATS:
                sizes[_FLOATS[name]] += torch.Size(shape).numel()
    else:
        for path in files.weights:
            for tensor in _unpickle_on_meta(path):
                if tensor.dtype in _FLOATS.values():
                    sizes[tensor.dtype] += tensor.numel()
    if not sizes:
        raise UnsupportedModelError(
            f"{files.name}: no floating-point weights; expected float16, bfloat16 or float32. "
            "Use the unquantized model."
        )
    most = sizes.most_common(1)[0][0]
    return most if most in _SIXTEEN_BIT else sixteen_bit(announced_dtype(files.config) or most)


def announced_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype that a config says its model is loaded in; None where it says none."""
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            dtype = getattr(torch, str(source.get(key)).removeprefix("torch."), None)
            if isinstance(dtype, torch.dtype):
                return dtype
    return None


def sixteen_bit(dtype: torch.dtype) -> torch.dtype:
    """Return the 16-bit dtype in which values of a dtype are stored: itself, or else float16."""
    return dtype if dtype in _SIXTEEN_BIT else torch.float16


def round_parameters(
    model: nn.Module, files: ModelFiles, family: Family, *, storage: torch.dtype, compute: torch.dtype
) -> None:
    """Round every parameter to the storage dtype, then convert it; buffers (rotary tables) keep full precision.

    Those of parts that are not text are only converted: nothing computes with them, and an export copies the source's.

    Raises:
        ArtifactError: a parameter holds NaN or infinite values.
        UnsupportedModelError: a value is too large for the storage dtype.
    """
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        value = rounded(value, name, files, storage=storage) if family.owns(name) else value
        parameter.data = value.to(compute)


def all_finite(value: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    if not value.numel():
        return True
    if value.is_floating_point() and value.dtype.itemsize == 1:
        return bool(torch.isfinite(value.float()).all())  # of floats of 8 bits torch has no extremes
    # The extremes are NaN where a value is. They take one look at it, `torch.isfinite` several copies of it.
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def rounded(value: Tensor, name: str, files: ModelFiles, *, storage: torch.dtype) -> Tensor:
    """Return a value in the storage dtype.

    Args:
        value: of any shape.
        name: what it is called in errors.
        files: the model that it is from.
        storage: float16 or bfloat16.

    Raises:
        ArtifactError: it holds NaN or infinite values.
        UnsupportedModelError: it holds one that is too large for the storage dtype.
    """
    if not all_finite(value):
        raise ArtifactError(f"{files.folder}: {name} holds NaN or infinite values. Get the files again.")
    result = value.to(storage)
    if result.dtype != value.dtype and not all_finite(result):
        raise UnsupportedModelError(
            f"{files.name}: {name} holds {value.abs().max().item():.3g}, and {storage} ends at "
            f"{torch.finfo(storage).max:.3g}. Convert the checkpoint to bfloat16 first."
        )
    return result


def parameters_sha256(model: nn.Module) -> str:
    """Return the checksum of a model in memory: of every parameter's name, dtype, shape and bytes."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        content = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(memoryview(content.numpy()))  # type: ignore[arg-type] # numpy's stubs do not say it is a buffer
    return total.hexdigest()


def _unpickle_on_meta(path: Path) -> list[Tensor]:
    """Return the tensors of a pickle without their data; nothing but tensors and plain containers is constructed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its deprecated storage classes in old files
            content = torch.load(path, map_location="meta", weights_only=True)
        return [value for value in content.values() if isinstance(value, Tensor)]
    except Exception as err:  # hostile bytes make the unpickler raise anything
        raise ArtifactError(
            f"{path}: cannot be read as weights ({type(err).__name__}); expected a pickle of plain tensors. "
            "Convert the model to safetensors where it comes from."
        ) from err
