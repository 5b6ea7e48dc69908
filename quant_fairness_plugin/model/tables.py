"""The token embedding and the head of a model in blocks: they stay in their files, and are read by rows or slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.reading import Place, read_parts, read_rows, same_values
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.storage import rounded

_PART_VALUES = 1 << 22
"""Values of a table that are checked at once."""


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix with a row per token of the vocabulary, left in its file (on an accelerator: held there in 16 bit)."""

    name: str
    place: Place
    storage: torch.dtype
    compute: torch.dtype
    device: torch.device
    held: Tensor | None

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows, `[indices, width]`, in the compute dtype."""
        if self.held is not None:
            return self.held[indices].to(self.compute)
        return self._ready(read_rows(self.place, indices.tolist()))

    def part(self, part: slice) -> Tensor:
        """Return consecutive rows, `[rows, width]`, in the compute dtype."""
        if self.held is not None:
            return self.held[part].to(self.compute)
        [values] = read_parts(self.place, [(part.start, part.stop)])
        return self._ready(values)

    def equals(self, other: Table) -> bool:
        """Return whether both hold the same values, compared in their files."""
        if self.held is not None or other.held is not None:
            return False
        return self.compute == other.compute and same_values(self.place, other.place)

    def _ready(self, values: Tensor) -> Tensor:
        return values.to(self.storage).to(device=self.device, dtype=self.compute)


def tables_of(
    model: PreTrainedModel,
    files: ModelFiles,
    places: Mapping[str, Place],
    storage: torch.dtype,
    compute: torch.dtype,
    device: str,
) -> dict[str, Table]:
    """Return the token embedding and the head, by all their names, with their values checked."""
    tables: dict[int, Table] = {}
    owners = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    shared = {id(owner.weight) for owner in owners}
    names: dict[str, Table] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            continue
        if id(parameter) not in tables:
            held = _check_table(places[name], name, files, storage, keep=device != "cpu")
            held = None if held is None else held.to(device)
            tables[id(parameter)] = Table(name, places[name], storage, compute, torch.device(device), held)
        names[name] = tables[id(parameter)]
    return names


def _check_table(place: Place, name: str, files: ModelFiles, storage: torch.dtype, *, keep: bool) -> Tensor | None:
    rows, size = place.shape[0], max(1, _PART_VALUES // max(1, place.shape[1]))
    parts = read_parts(place, ((start, min(start + size, rows)) for start in range(0, rows, size)))
    checked_parts: list[Tensor] = []
    for values in parts:
        checked = rounded(values, name, files, storage=storage)
        checked_parts += [checked] if keep else []
    return torch.cat(checked_parts) if keep else None


def look_up_in_files(model: PreTrainedModel, tables: Mapping[str, Table]) -> None:
    """Make the embedding read the rows that a call needs, unless its weights are in memory."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    [name] = [f"{path}.weight" for path, module in model.named_modules() if module is embedding]
    table, plain = tables[name], embedding.forward

    def look_up(ids: Tensor, *positional: Any, **named: Any) -> Any:
        if not _is_hollow(embedding.weight):
            return plain(ids, *positional, **named)
        used, places = torch.unique(ids, return_inverse=True)
        hollow, padding = embedding.weight.data, embedding.padding_idx
        try:
            # The padding token matters to gradients alone, and must not be beyond the rows that are there.
            embedding.weight.data, embedding.padding_idx = table.rows(used), None
            return plain(places, *positional, **named)
        finally:
            embedding.weight.data, embedding.padding_idx = hollow, padding

    lookup: Callable[..., Any] = look_up
    embedding.forward = lookup  # type: ignore[method-assign] # calls of the module look it up on the instance first


def _is_hollow(value: Tensor) -> bool:
    return value.stride() == (0, 0)
