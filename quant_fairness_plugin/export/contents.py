"""Step 7, what goes into the weight files: every tensor once, quantized modules packed, all else in 16 bit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.export.formats import Format, ModuleMap
from quant_fairness_plugin.export.formats.awq import SCALED_ACTIVATIONS
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.quantize.bank import stored_form
from quant_fairness_plugin.quantize.stream import QuantizedModel

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_HEAD_ON_DISK = {"gpt_neox": "embed_out"}
"""Families whose head has another name in files and servers than in Transformers, which renames it while loading."""
NO_WIDTHS: Mapping[str, int] = MappingProxyType({})


def stored_name(name: str, family: Family) -> str:
    """The name that checkpoints of a family use for a module or tensor of the model in memory."""
    head = _HEAD_ON_DISK.get(family.name, family.head)
    return head + name.removeprefix(family.head) if name.split(".")[0] == family.head else name


def module_map(
    model: nn.Module, family: Family, quantized: Iterable[str], *, bits: Mapping[str, int] = NO_WIDTHS
) -> ModuleMap:
    """Sort a model's linear modules into quantized and kept ones. The model may live on the meta device.

    Args:
        model: the 16-bit model.
        family: its family map.
        quantized: full names of the quantized modules, in any order.
        bits: those of them that have other bits than the grid, with their bits.
    """
    done = set(quantized)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    layers = len(model.get_submodule(family.blocks))  # type: ignore[arg-type] # a ModuleList, says the family
    fused = {
        f"{family.blocks}.{layer}.{unit.fused}": tuple(f"{family.blocks}.{layer}.{part}" for part in unit.modules)
        for layer in range(layers)
        for unit in family.units
        if unit.fused is not None
    }
    return ModuleMap(
        blocks=family.blocks,
        quantized=tuple(name for name in linears if name in done),
        kept=tuple(name for name in linears if name not in done),
        fused=fused,
        bits={name: bits[name] for name in linears if name in bits},
        aliases=tuple({stored_name(family.head, family)} - {family.head}),
    )


def own_widths(bits: Mapping[str, int], grid: Grid) -> dict[str, int]:
    """The modules among `bits` (module → bits) that have other bits than the grid, as `module_map` takes them."""
    return {name: width for name, width in bits.items() if width != grid.bits}


def activation_scales(model: nn.Module, format_name: str) -> dict[str, int]:
    """Tensors that Transformers wants in an `awq` file beside the model's own: full name → length.

    Its AWQ integration divides some activations by scales, in every block, quantized or not. Ours are ones.

    Args:
        model: the unquantized model, on any device.
        format_name: the checkpoint format.
    """
    names = SCALED_ACTIVATIONS.get(str(getattr(model.config, "model_type", "")))
    if format_name != "awq" or names is None:
        return {}
    activation, before = names
    return {
        f"{name}.{activation}.scales": len(linear_weight(getattr(module, before)))
        for name, module in model.named_modules()
        if hasattr(module, activation) and hasattr(module, before)
    }


def checkpoint_tensors(quantized: QuantizedModel, layout: Format | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by name, made one at a time.

    Tensors that the model shares (a tied head) come once, under the name that is registered first.

    Args:
        quantized: the model and its quantized modules; values that its method folded replace the model's.
        layout: how a quantized module is stored; None stores its dequantized values in 16 bit.

    Yields:
        Full tensor name and a contiguous CPU tensor; floating-point tensors are in the storage dtype.
    """
    model, dtype = quantized.loaded.model, quantized.loaded.storage_dtype
    weights = {f"{name}.weight": name for name in quantized.tensors}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tied and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        module = weights.get(name)
        if module is None:
            value = quantized.folded.get(name, tensor)
            kind = dtype if value.is_floating_point() else value.dtype
            # A copy, because safetensors refuses tensors that share memory.
            yield stored_name(name, quantized.loaded.family), value.to("cpu", kind, copy=True).contiguous()
        elif layout is not None:
            yield from layout.tensors(module, quantized.tensors[module]).items()
        else:
            dense = stored_form(model.get_submodule(module), quantized.dense_weight(module))
            yield name, dense.to("cpu", dtype).contiguous()
    for name, length in activation_scales(model, layout.name if layout is not None else "").items():
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
