"""Tensors of an export that are its source's, byte for byte: their checksums, and whether they still hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.checkpoint.folder import weight_files
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.reading import places_of_file, read_tensor


def check_copies(folder: Path, record: ExportRecord) -> str:
    """Check that the tensors which an export took from its source are those that were recorded, byte for byte.

    Returns:
        One sentence about how many they are.

    Raises:
        ArtifactError: a tensor that is missing, or holds other bytes; names it.
    """
    places = {name: place for path in weight_files(folder) for name, place in places_of_file(path)}
    for name, checksum in record.copied_tensors.items():
        if name not in places or tensor_sha256(read_tensor(places[name])) != checksum:
            problem = "holds other bytes than" if name in places else "is missing, and is recorded as"
            raise ArtifactError(f"{folder}: {name} {problem} what was copied from the source. Export again.")
    return f"{len(record.copied_tensors)} tensors hold the bytes of the source"


def tensor_sha256(tensor: Tensor) -> str:
    """Return the checksum of a CPU tensor's dtype, shape and bytes."""
    total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    total.update(memoryview(content.numpy()))  # type: ignore[arg-type] # numpy's stubs do not say it is a buffer
    return total.hexdigest()
