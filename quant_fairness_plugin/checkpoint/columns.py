"""The side file of input channels that keep 16 bit beside a complete quantized checkpoint.

`quant_fairness_columns.safetensors` holds, for each module that keeps some, `<module>.idx`, int32 `[C]`, and
`<module>.delta`, 16-bit `[rows, C]`: the 16-bit weight minus the dequantized one. Only `serve.load_quantized` adds
`x[..., idx] @ delta^T`; every other reader overlooks the file and computes what the integers say. vLLM reads all
`*.safetensors` files of a folder unless an index names the right ones, so such a checkpoint always has an index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.errors import ArtifactError, ResourceError
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.model.resolve import BUNDLED, model_sha256, resolve_model
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.methods import find_method

COLUMNS_FILE = "quant_fairness_columns.safetensors"
SUFFIXES = ("idx", "delta")


def write_columns(columns: Mapping[str, KeptColumns], folder: Path) -> None:
    """Write the side file into an existing folder; none where no module keeps channels.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    if not columns:
        return
    tensors = {f"{name}.idx": kept.index for name, kept in columns.items()}
    tensors |= {f"{name}.delta": kept.delta for name, kept in columns.items()}
    path = folder / COLUMNS_FILE
    # Copies, because modules of a fusion group share their channels, and safetensors refuses shared memory.
    copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata={"format": "pt"})
    except SafetensorError as err:
        raise ResourceError(f"{path}: cannot be written ({err}). Free space or choose another --out.") from err
    os.chmod(path, folder.stat().st_mode & 0o666)  # as for the weights: what the umask allows


def read_columns(folder: Path) -> dict[str, KeptColumns]:
    """Module → the channels that it keeps, from the side file; empty where there is none.

    Raises:
        ArtifactError: a malformed file, a tensor that is too much or missing, another dtype or shape, channels that are
            not ascending (and so may occur twice), or values that are not finite.
    """
    path = folder / COLUMNS_FILE
    if not path.is_file():
        return {}
    names = read_header(path)
    modules = sorted({name.rpartition(".")[0] for name in names})
    wanted = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES}
    for name in sorted(wanted ^ names.keys()):
        raise ArtifactError(f"{path}: {name} is {'missing' if name in wanted else 'unexpected'}. Export again.")
    with safe_open(path, framework="pt") as file:
        return {
            module: _checked(path, module, file.get_tensor(f"{module}.idx"), file.get_tensor(f"{module}.delta"))
            for module in modules
        }


def check_fit(folder: Path, name: str, kept: KeptColumns, shape: tuple[int, ...]) -> None:
    """Refuse channels that a module of shape `(rows, cols)` does not have.

    Raises:
        ArtifactError: they do not fit.
    """
    rows, cols = shape
    if int(kept.index[-1]) >= cols or len(kept.delta) != rows:
        raise ArtifactError(
            f"{folder / COLUMNS_FILE}: {name} has channels up to {int(kept.index[-1])} and {len(kept.delta)} rows; the "
            f"module is [{rows}, {cols}]. Export again."
        )


def check_difference(name: str, kept: KeptColumns, weight: Tensor, dense: Tensor) -> None:
    """The stored difference must be the 16-bit weight minus the dequantized one, bit for bit.

    Args:
        name: the module.
        kept: its channels.
        weight: its 16-bit weight `[rows, cols]`.
        dense: its dequantized weight, float32 `[rows, cols]`.

    Raises:
        ArtifactError: it is not.
    """
    index = kept.index.long()
    if not torch.equal((weight.float() - dense)[:, index].to(kept.delta.dtype), kept.delta):
        raise ArtifactError(
            f"{COLUMNS_FILE}: {name}.delta is not the difference to the 16-bit weight. Export again, or report this as "
            "a bug."
        )


def _checked(path: Path, module: str, index: Tensor, delta: Tensor) -> KeptColumns:
    if index.dtype != torch.int32 or delta.dtype not in (torch.float16, torch.bfloat16):
        raise ArtifactError(
            f"{path}: {module} has {index.dtype} channels and a {delta.dtype} difference; expected are int32, and "
            "float16 or bfloat16. Export again."
        )
    if index.dim() != 1 or not len(index) or delta.dim() != 2 or delta.shape[1] != len(index):
        raise ArtifactError(
            f"{path}: {module} has channels {list(index.shape)} and a difference {list(delta.shape)}; expected are "
            "[C] and [rows, C]. Export again."
        )
    if int(index[0]) < 0 or bool((index.diff() <= 0).any()):
        raise ArtifactError(f"{path}: the channels of {module} must be ascending, each once, from 0. Export again.")
    if not bool(torch.isfinite(delta).all()):
        raise ArtifactError(f"{path}: {module}.delta holds NaN or infinite values. Export again.")
    return KeptColumns(index, delta)


def check_columns(folder: Path, record: ExportRecord, model: nn.Module, dtype: str) -> str:
    """The side file holds what the record says, and the difference to the 16-bit weights where those are at hand.

    Args:
        folder: an export.
        record: its record.
        model: the unquantized architecture, on any device.
        dtype: the storage dtype by the name that `config.json` uses.

    Returns:
        One sentence; empty where there is no such file, and none is recorded.

    Raises:
        ArtifactError: a malformed file, or modules, channels, shapes, a dtype or values that do not fit; names them.
    """
    columns = read_columns(folder)
    _compare_with_record(folder, columns, record)
    for name, kept in columns.items():
        check_fit(folder, name, kept, tuple(linear_weight(model.get_submodule(name)).shape))
        if str(kept.delta.dtype) != f"torch.{dtype}":
            raise ArtifactError(
                f"{folder / COLUMNS_FILE}: {name}.delta is {kept.delta.dtype}, expected {dtype}. Export again."
            )
    if not columns:
        return ""
    compared = _compare_with_source(folder, columns, record)
    total = sum(len(kept.index) for kept in columns.values())
    return f"{total} input channels of {len(columns)} modules in 16 bit, {compared}"


def _compare_with_record(folder: Path, columns: dict[str, KeptColumns], record: ExportRecord) -> None:
    for name in sorted(columns.keys() | record.protected_columns.keys()):
        counted = len(columns[name].index) if name in columns else 0
        recorded = record.protected_columns.get(name, 0)
        if counted != recorded:
            raise ArtifactError(
                f"{folder / COLUMNS_FILE}: {name} keeps {counted} input channels, recorded are {recorded}. Export "
                "again."
            )
        if name not in record.quantized_modules:
            raise ArtifactError(f"{folder / COLUMNS_FILE}: {name} keeps channels and is not quantized. Export again.")


def _compare_with_source(folder: Path, columns: dict[str, KeptColumns], record: ExportRecord) -> str:
    """Compare with the weights that the export was made from, where no scale was moved and the name says which."""
    weights = None if find_method(record.method).moves_scales else _source_weights(record)
    if weights is None:
        return "not compared with the source, which is not at hand or has been scaled"
    checkpoint = open_checkpoint(folder)
    for name, kept in columns.items():
        stored = weights[f"{name}.weight"]
        weight = stored.t() if is_conv1d(checkpoint.bare.get_submodule(name)) else stored
        check_difference(name, kept, weight, checkpoint.dense(name))
    return f"the difference to {record.provenance.model}"


def _source_weights(record: ExportRecord) -> dict[str, Tensor] | None:
    """Tensor name → 16-bit tensor of the model that was exported, if it is a bundled one, unchanged since."""
    if record.provenance.model not in BUNDLED:
        return None
    files = resolve_model(record.provenance.model)
    if model_sha256(files) != record.provenance.model_sha256:
        return None
    weights: dict[str, Tensor] = {}
    for path in files.weights:
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in read_header(path)}
    return weights
