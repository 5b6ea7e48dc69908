"""Tensors that an export takes from its source as they are: parts that are not text, and what no module has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from quant_fairness_plugin.checkpoint.copied import tensor_sha256
from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.reading import read_tensor
from quant_fairness_plugin.model.unread import roots, sort_names


@dataclass(frozen=True, slots=True)
class Copies:
    """What is copied, by its name in the export."""

    tensors: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """How to read each of them, in the order in which they are written."""
    roots: tuple[str, ...] = ()
    """Outermost names of those that no module of the model has."""
    unread: tuple[str, ...] = ()
    """Those that no module of the model has."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, one in memory at a time."""
        return ((name, read()) for name, read in self.tensors.items())

    def checksums(self) -> dict[str, str]:
        """Return the sha256 of every tensor's bytes, read from the source."""
        return {name: tensor_sha256(tensor) for name, tensor in self.read()}

    def summary(self) -> str:
        """Return one line about them; empty where nothing is copied."""
        if not self.tensors:
            return ""
        words = [f"{len(self.tensors)} tensors are copied unread"]
        if self.unread:
            words.append(
                f"{len(self.unread)} of them belong to no module of Transformers' model ({', '.join(self.roots)})"
            )
        return ", ".join(words)


def copies_of(loaded: LoadedModel) -> Copies:
    """Return what an export of a model takes from the model's files as it is.

    Of a model that is only in memory, it is the values of the parts that are not text, in the storage dtype.

    Raises:
        ArtifactError: the files cannot be read.
    """
    weights = loaded.files.weights
    if not weights or weights[0].suffix != ".safetensors":
        return Copies(_from_memory(loaded))
    places = find_tensors(loaded.files)
    kinds = sort_names(loaded.model, loaded.family, places)
    return Copies(
        tensors={name: partial(read_tensor, places[name]) for name in kinds.copied},
        roots=roots(kinds.own, kinds.unread),
        unread=tuple(kinds.unread),
    )


def _from_memory(loaded: LoadedModel) -> dict[str, Callable[[], Tensor]]:
    if loaded.family.wrapper is None:
        return {}
    state = {name: value for name, value in loaded.model.state_dict().items() if not loaded.family.owns(name)}
    saved = revert_weight_conversion(loaded.model, state)
    return {name: partial(_stored, value, loaded.storage_dtype) for name, value in saved.items()}


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to("cpu", dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
