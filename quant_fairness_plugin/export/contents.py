"""What goes into the weight files: every tensor once, quantized modules packed, all else in 16 bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant_fairness_plugin.checkpoint.experts import kept_experts, owner_of, stacked_tensors
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.module_map import stored_name
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.quantized import QuantizedModel


def checkpoint_tensors(quantized: QuantizedModel, layout: Format) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint that is not copied, by name, made one at a time.

    Tensors that the model shares (a tied head) come once, under the name that is registered first.

    Args:
        quantized: the model and its quantized modules; values that its method folded replace the model's.
        layout: how a quantized module is stored; one that packs nothing stores its dequantized values in 16 bit.

    Yields:
        Full tensor name and a contiguous CPU tensor; floating-point tensors are in the storage dtype.
    """
    loaded, dtype = quantized.loaded, quantized.loaded.storage_dtype
    family = loaded.family
    weights = {f"{name}.weight": name for name in quantized.tensors}
    kept = kept_experts(loaded.model, quantized.tensors) if layout.packs else {}
    for name in names_once(quantized.loaded):
        module = weights.get(name)
        if owner_of(name, kept) is not None:
            continue  # stacked, below
        if module is None:
            yield _plain_tensor(quantized, name)
        elif layout.packs:
            parts = layout.tensors(stored_name(module, family), quantized.tensors[module])
            yield from ((full, part.cpu()) for full, part in parts.items())
        else:
            dense = quantized.dense_weight(module)
            dense = dense.t() if is_conv1d(loaded.model.get_submodule(module)) else dense
            yield stored_name(name, family), dense.to("cpu", dtype).contiguous()
    for owner, experts in kept.items():
        for part, stack in stacked_tensors(owner, experts, loaded.stored).items():
            yield stored_name(part, family), stack().to("cpu", dtype)
    for name, length in layout.added_tensors(loaded.model).items():
        yield name, torch.ones(length, dtype=dtype)


def plain_tensors(quantized: QuantizedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that are not quantized, as `checkpoint_tensors` does; none of a mixture's is stacked."""
    weights = {f"{name}.weight" for name in quantized.tensors}
    return (_plain_tensor(quantized, name) for name in names_once(quantized.loaded) if name not in weights)


def names_once(loaded: LoadedModel) -> Iterator[str]:
    """Yield the names in a model of its tensors that are not copied, one of those that are shared."""
    tied = bool(getattr(loaded.model.config, "tie_word_embeddings", False))
    once = {name for name, _ in loaded.model.named_parameters()}
    every = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    for name in loaded.model.state_dict():
        if loaded.family.owns(name) and not (tied and name in every - once):
            yield name


def _plain_tensor(quantized: QuantizedModel, name: str) -> tuple[str, Tensor]:
    """Return what files call a tensor of the model, and its value: what the method folded, else the model's."""
    loaded, folded = quantized.loaded, quantized.folded.get(name)
    # A copy, because safetensors refuses tensors that share memory.
    value = loaded.stored(name) if folded is None else folded.to("cpu", loaded.storage_dtype, copy=True)
    return stored_name(name, loaded.family), value.contiguous()
