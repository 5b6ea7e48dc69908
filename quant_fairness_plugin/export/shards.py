"""Weight files that are written tensor by tensor, so that no more than one tensor is held."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.reading import DTYPES

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = SHARD_BYTES, indexed: bool = False
) -> None:
    """Write `model.safetensors`, or numbered shards and their index where one file would be too large.

    Holds one tensor in memory. A single tensor above the limit gets a shard of its own.

    Args:
        tensors: names and tensors, in the order in which they are stored.
        folder: an existing folder.
        shard_bytes: the largest size of the tensors of one file.
        indexed: write an index for a single file too.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    shards = [_Shard(folder, 0)]
    total = 0
    try:
        for name, tensor in tensors:
            if shards[-1].size and shards[-1].size + tensor.nbytes > shard_bytes:
                shards[-1].finish()
                shards.append(_Shard(folder, len(shards)))
            shards[-1].add(name, tensor)
            total += tensor.nbytes
        shards[-1].finish()
    except OSError as err:
        raise ResourceError(
            f"{shards[-1].path}: cannot be written ({err.strerror or err}); its tensors have {shards[-1].size} bytes "
            "so far. Free space or choose another --out."
        ) from err
    finally:
        shards[-1].close()
    _name_shards(shards, folder, total, indexed)


class _Shard:
    """One safetensors file: the data first, by size of a value, then the header in front of it.

    Values lie at multiples of their size, as readers that map the file need them to: so those of the widest types come
    first, in files of their own until the end.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"part-{number:05d}.safetensors"
        self.size = 0
        self.names: dict[str, Tensor] = {}
        """Name → a tensor without memory, of its type and shape."""
        self._parts: dict[int, BinaryIO] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the values of a tensor on the CPU."""
        part = self._part(tensor.dtype.itemsize)
        part.write(memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type] # numpy's stubs do not say that it is a buffer
        self.names[name] = torch.empty_like(tensor, device="meta")
        self.size += tensor.nbytes

    def finish(self) -> None:
        """Put header and data together."""
        with self.path.open("xb") as file:
            # `open` leaves it to the umask who may read: a folder made by mkdir shows what that is.
            os.chmod(self.path, self.path.parent.stat().st_mode & 0o666)
            file.write(self._header())
            for itemsize in sorted(self._parts, reverse=True):
                self._parts[itemsize].seek(0)
                shutil.copyfileobj(self._parts[itemsize], file, 1 << 20)
        self.close()

    def close(self) -> None:
        """Close and remove the files of its parts, of which an error can leave some."""
        for part in self._parts.values():
            part.close()
            Path(part.name).unlink(missing_ok=True)
        self._parts.clear()

    def _part(self, itemsize: int) -> BinaryIO:
        if itemsize not in self._parts:
            self._parts[itemsize] = self.path.with_suffix(f".{itemsize}").open("x+b")
        return self._parts[itemsize]

    def _header(self) -> bytes:
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in sorted(self.names.items(), key=lambda item: -item[1].dtype.itemsize):  # else as written
            content[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def _name_shards(shards: list[_Shard], folder: Path, total: int, indexed: bool) -> None:
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        final = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.rename(shard.path, folder / final)
        weight_map |= dict.fromkeys(shard.names, final)
    if single and not indexed:
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
