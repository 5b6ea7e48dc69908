"""Step 7, verify: the side file of 16-bit input channels against the record, the model, and its source if at hand."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.columns import COLUMNS_FILE, check_difference, check_fit, read_columns
from quant_fairness_plugin.export.dequantize import open_checkpoint
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.model.resolve import BUNDLED, model_sha256, resolve_model
from quant_fairness_plugin.quantize.columns import KeptColumns


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
    found = read_columns(folder)
    _compare_with_record(folder, found, record)
    for name, kept in found.items():
        check_fit(folder, name, kept, tuple(linear_weight(model.get_submodule(name)).shape))
        if str(kept.delta.dtype) != f"torch.{dtype}":
            raise ArtifactError(
                f"{folder / COLUMNS_FILE}: {name}.delta is {kept.delta.dtype}, expected {dtype}. Export again."
            )
    if not found:
        return ""
    compared = _compare_with_source(folder, found, record)
    total = sum(len(kept.index) for kept in found.values())
    return f"{total} input channels of {len(found)} modules in 16 bit, {compared}"


def _compare_with_record(folder: Path, found: dict[str, KeptColumns], record: ExportRecord) -> None:
    for name in sorted(found.keys() | record.protected_columns.keys()):
        counted = len(found[name].index) if name in found else 0
        recorded = record.protected_columns.get(name, 0)
        if counted != recorded:
            raise ArtifactError(
                f"{folder / COLUMNS_FILE}: {name} keeps {counted} input channels, recorded are {recorded}. Export "
                "again."
            )
        if name not in record.quantized_modules:
            raise ArtifactError(f"{folder / COLUMNS_FILE}: {name} keeps channels and is not quantized. Export again.")


def _compare_with_source(folder: Path, found: dict[str, KeptColumns], record: ExportRecord) -> str:
    """Compare with the weights that the export was made from; AWQ changed them, and few are known by their name."""
    weights = None if record.method == "awq" else _source_weights(record)
    if weights is None:
        return "not compared with the source, which is not at hand or has been scaled"
    checkpoint = open_checkpoint(folder)
    for name, kept in found.items():
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
