"""A quantized model to be run block by block: the 16-bit model's files, and what was solved in place of weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quant_fairness_plugin.measure.scoring import ModelState, block_state
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.quantize.quantized import QuantizedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBlocks(StreamedModel):
    """A `StreamedModel` whose blocks hold what a quantized model computes with."""

    quantized: QuantizedModel

    def _read(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if name in self.quantized.folded:
            return self.quantized.folded[name]
        if module not in self.quantized.tensors:
            return StreamedModel._read(self, name)
        weight = self.quantized.dense_weight(module)
        return weight.t().contiguous() if is_conv1d(self.model.get_submodule(module)) else weight


def quantized_state(name: str, quantized: QuantizedModel) -> ModelState:
    """Return a quantized model as a model state: block by block where its model is, else dequantized once and held."""
    loaded = quantized.loaded
    if not isinstance(loaded, StreamedModel):
        weights = quantized.dense_weights()
        return ModelState(name, lambda: swapped(loaded, weights))
    blocks = QuantizedBlocks(
        files=loaded.files, model=loaded.model, tokenizer=loaded.tokenizer, family=loaded.family,
        storage_dtype=loaded.storage_dtype, places=loaded.places, tables=loaded.tables, compute=loaded.compute,
        quantized=quantized,
    )  # fmt: skip
    return block_state(name, blocks)
