"""A checkpoint folder to be run block by block: its blocks are read and dequantized by our own reader while needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quant_fairness_plugin.checkpoint.columns import check_fit, read_columns
from quant_fairness_plugin.checkpoint.dequantize import Checkpoint, open_checkpoint
from quant_fairness_plugin.checkpoint.experts import kept_experts
from quant_fairness_plugin.checkpoint.folder import read_config, weight_files
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.measure.scoring import find_head
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.experts import Experts, stacked_shapes
from quant_fairness_plugin.model.linear import is_conv1d, linear_weight
from quant_fairness_plugin.model.reading import Place
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from quant_fairness_plugin.model.resolve import ModelFiles, layer_count
from quant_fairness_plugin.model.stacked_files import rows_of
from quant_fairness_plugin.model.streamed import StreamedModel, find_parts
from quant_fairness_plugin.quantize.columns import KeptColumns

HEAD_ROWS = 1 << 14
"""Rows of the head that are read at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed(Place):
    """Stands for the weight of a quantized module, which several tensors hold together."""

    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedCheckpoint(StreamedModel):
    """A folder whose blocks are dequantized while they are read."""

    checkpoint: Checkpoint
    columns: Mapping[str, KeptColumns]
    experts: torch.dtype | None = None
    """What the values of quantized experts are rounded to; None leaves them as they are."""

    def _read(self, name: str) -> Tensor:
        place = self.places[name]
        if not isinstance(place, _Packed):
            return StreamedModel._read(self, name)
        weight = self.checkpoint.dense(place.module)
        if self.experts is not None and ".experts." in place.module:
            weight = weight.to(self.experts).float()
        if place.module in self.columns:
            weight = self.columns[place.module].added_to(weight)
        return weight.t().contiguous() if is_conv1d(self.model.get_submodule(place.module)) else weight


def stream_checkpoint(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_columns: bool = True,
    experts: torch.dtype | None = None,
) -> StreamedCheckpoint:
    """Open any of our exports, or a folder of another tool, to be run block by block; see `load_dense_model`.

    Args:
        folder: the checkpoint.
        tokenizer: of the texts that it will be run on, where there are any; the folder's own is not read.
        dtype: what is computed in.
        device: where it is computed.
        with_columns: add the channels that a side file keeps in 16 bit, of which other readers do not know.
        experts: round the values of quantized experts to this; None leaves them as they are.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
        UnsupportedModelError: another quantization method or layout, or a model that cannot be run block by block.
    """
    checkpoint, columns = open_checkpoint(folder, dtype=dtype), read_columns(folder) if with_columns else {}
    model = checkpoint.bare
    places = {name: checkpoint.places[name] for name in checkpoint.plain}
    for name, kept in kept_experts(model, checkpoint.packed).items():
        places |= _unstacked(name, kept, places, {name, checkpoint.stored_name(name)})
    for module in checkpoint.packed:
        rows, cols = linear_weight(model.get_submodule(module)).shape
        if module in columns:
            check_fit(folder, module, columns[module], (rows, cols))
        shape = (cols, rows) if is_conv1d(model.get_submodule(module)) else (rows, cols)
        places[f"{checkpoint.stored_name(module)}.weight"] = _Packed(folder, 0, torch.float32, shape, module=module)
    config, _ = read_config(folder)
    # Values are taken as they are stored: float32 holds all of them.
    storage = torch.float32
    files = ModelFiles(folder.name, folder, config, weight_files(folder), layer_count(folder, config), None)
    parts = find_parts(model, files, places, storage=storage, compute=dtype, device=device)
    streamed = StreamedCheckpoint(
        files=files, model=model, tokenizer=cast(PreTrainedTokenizerBase, tokenizer), family=parts.family,
        storage_dtype=storage, places=parts.places, tables=parts.tables, compute=dtype, checkpoint=checkpoint,
        columns=columns, experts=experts,
    )  # fmt: skip
    streamed.settle(torch.device(device))
    return streamed


def _unstacked(name: str, experts: Experts, places: dict[str, Place], stored: set[str]) -> dict[str, Place]:
    """Return where the matrices of a layer's stacked experts are, and take the stacks from the places.

    Args:
        name: of the experts in the model.
        experts: them.
        places: of all tensors.
        stored: the names that the experts may have in the files.

    Raises:
        UnsupportedModelError: stacks whose matrices do not lie one after the other.
    """
    keys = {part: [key for key in (f"{s}.{part}" for s in stored) if key in places] for part in stacked_shapes(experts)}
    if not all(keys.values()):
        return {}  # the check of all tensors says what is missing
    stacks = {part: places.pop(key) for part, [key] in keys.items()}
    if experts.is_transposed:
        raise UnsupportedModelError(f"{name}: transposed experts are not read block by block; load it as a whole")
    both, down = stacks["gate_up_proj"], stacks["down_proj"]
    inner, parts = both.shape[1] // 2, dict[str, Place]()
    for number in range(len(experts)):
        matrices = (
            rows_of(both, 2 * number * inner, inner),
            rows_of(both, (2 * number + 1) * inner, inner),
            rows_of(down, number * down.shape[1], down.shape[1]),
        )
        parts |= {f"{name}.{number}.{last}.weight": place for last, place in zip(experts.names, matrices, strict=True)}
    return parts


class BlockLogits:
    """The logits of a folder's dequantized model on some rows of token ids, one row at a time."""

    @torch.no_grad()
    def __init__(
        self,
        folder: Path,
        rows: Sequence[Sequence[int]],
        *,
        dtype: torch.dtype = torch.float32,
        experts: torch.dtype | None = None,
    ) -> None:
        """Run all rows up to the head, with what the weight files alone say.

        Args:
            folder: the checkpoint.
            rows: token ids.
            dtype: what is computed in.
            experts: as in `stream_checkpoint`.

        Raises:
            ArtifactError, UnsupportedModelError: as `stream_checkpoint`.
        """
        loaded = stream_checkpoint(folder, dtype=dtype, with_columns=False, experts=experts)
        ids = [torch.tensor([row]) for row in rows]
        starts = [rehearse(loaded, row) for row in ids]
        hidden = [start.hidden for start in starts]
        with block_feed(loaded, range(loaded.layers), prefetch=False) as resident:
            for layer in range(loaded.layers):
                with resident(layer):
                    hidden = [s.calls[layer].run(loaded.block(layer), h) for s, h in zip(starts, hidden, strict=True)]
        self._given = [head_input(loaded, row, None, last) for row, last in zip(ids, hidden, strict=True)]
        self._head = find_head(loaded)
        self._vocabulary = len(self._head.weight)

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        """Yield the logits of each row, float32 `[1, tokens, vocabulary]`."""
        for hidden in self._given:
            starts = range(0, self._vocabulary, HEAD_ROWS)
            yield torch.cat(
                [self._head.logits(hidden, slice(s, min(s + HEAD_ROWS, self._vocabulary))) for s in starts], -1
            )
