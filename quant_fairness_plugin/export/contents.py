"""What goes into the weight files: every tensor once, quantized modules packed, all else in 16 bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant_fairness_plugin.checkpoint.experts import kept_experts, owner_of, stacked_tensors
from quant_fairness_plugin.checkpoint.formats.format import Format
from quant_fairness_plugin.checkpoint.module_map import stored_name
from quant_fairness_plugin.model.linear import is_conv1d
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
    tied = bool(getattr(loaded.model.config, "tie_word_embeddings", False))
    once = {name for name, _ in loaded.model.named_parameters()}
    every = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    for name in loaded.model.state_dict():
        if not family.owns(name) or (tied and name in every - once):
            continue
        module = weights.get(name)
        if owner_of(name, kept) is not None:
            continue  # stacked, below
        if module is None:
            # A copy, because safetensors refuses tensors that share memory.
            folded = quantized.folded.get(name)
            value = loaded.stored(name) if folded is None else folded.to("cpu", dtype, copy=True)
            yield stored_name(name, family), value.contiguous()
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
