"""What goes into the weight files: every tensor once, quantized modules packed, all else in 16 bit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quant_fairness_plugin.checkpoint.experts import kept_experts, owner_of, stacked_tensors
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.module_map import stored_name
from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.quantize.stream import QuantizedModel

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def checkpoint_tensors(quantized: QuantizedModel, layout: Format) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint that is not copied, by name, made one at a time.

    Tensors that the model shares (a tied head) come once, under the name that is registered first.

    Args:
        quantized: the model and its quantized modules; values that its method folded replace the model's.
        layout: how a quantized module is stored; one that packs nothing stores its dequantized values in 16 bit.

    Yields:
        Full tensor name and a contiguous CPU tensor; floating-point tensors are in the storage dtype.
    """
    model, dtype, family = quantized.loaded.model, quantized.loaded.storage_dtype, quantized.loaded.family
    weights = {f"{name}.weight": name for name in quantized.tensors}
    kept = kept_experts(model, quantized.tensors) if layout.packs else {}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    once = {name for name, _ in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        if not family.owns(name) or (tied and name in every - once):
            continue
        module = weights.get(name)
        if owner_of(name, kept) is not None:
            continue  # stacked, below
        if module is None:
            value = quantized.folded.get(name, tensor)
            kind = dtype if value.is_floating_point() else value.dtype
            # A copy, because safetensors refuses tensors that share memory.
            yield stored_name(name, family), value.to("cpu", kind, copy=True).contiguous()
        elif layout.packs:
            parts = layout.tensors(stored_name(module, family), quantized.tensors[module])
            yield from ((full, part.cpu()) for full, part in parts.items())
        else:
            dense = stored_form(model.get_submodule(module), quantized.dense_weight(module))
            yield stored_name(name, family), dense.to("cpu", dtype).contiguous()
    for owner, experts in kept.items():
        for part, stack in stacked_tensors(owner, experts).items():
            yield stored_name(part, family), stack().to("cpu", dtype)
    for name, length in layout.added_tensors(model).items():
        yield name, torch.ones(length, dtype=dtype)


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, shard_bytes: int = SHARD_BYTES, indexed: bool = False
) -> None:
    """Write `model.safetensors`, or numbered shards and their index where one file would be too large.

    Holds one shard in memory. A single tensor above the limit gets a shard of its own.

    Args:
        tensors: names and tensors, in the order in which they are stored.
        folder: an existing folder.
        shard_bytes: the largest size of the tensors of one file.
        indexed: write an index for a single file too.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    parts: list[tuple[Path, list[str]]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            parts.append(_write_part(shard, folder, len(parts)))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    parts.append(_write_part(shard, folder, len(parts)))
    _name_parts(parts, folder, total, indexed)


def _write_part(shard: dict[str, Tensor], folder: Path, number: int) -> tuple[Path, list[str]]:
    path = folder / f"part-{number:05d}.safetensors"
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as err:
        raise ResourceError(
            f"{path}: cannot be written ({err}); the tensors need {sum(t.nbytes for t in shard.values())} bytes. "
            "Free space or choose another --out."
        ) from err
    # safetensors creates files for the owner alone; a folder made by mkdir shows what the umask allows.
    os.chmod(path, folder.stat().st_mode & 0o666)
    return path, list(shard)


def _name_parts(parts: list[tuple[Path, list[str]]], folder: Path, total: int, indexed: bool) -> None:
    single = len(parts) == 1
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = "model.safetensors" if single else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        os.rename(path, folder / final)
        weight_map |= dict.fromkeys(names, final)
    if single and not indexed:
        return
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
