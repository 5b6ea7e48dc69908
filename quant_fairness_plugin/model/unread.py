"""Which tensors of a checkpoint a model reads, which an export only copies, and which should not be there.

Published checkpoints hold tensors that no module of Transformers has: layers that predict further tokens (DeepSeek's
after the last block, Qwen's `mtp.*`), extra heads. They are copied. A tensor that belongs to a module that the model
has, or a whole block of the usual shape, means that config and files do not belong together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quant_fairness_plugin.model.architectures.architecture import OBSOLETE_BUFFERS
from quant_fairness_plugin.model.families import Family


class LoadedNames:
    """Names in files → names in a model, as Transformers changes them while it loads."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.wanted: Mapping[str, Any] = model.state_dict(keep_vars=True)
        changes = get_model_conversion_mapping(model)
        self._renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        self._converters = [change for change in changes if isinstance(change, WeightConverter)]
        self._prefix = model.base_model_prefix

    def find(self, stored: str) -> str:
        """Return the name in the model of a tensor of the files, which the model need not have.

        Of tensors that are merged or split while loading, it is the first of those that they become.
        """
        prefix, names = f"{self._prefix}.", []
        # Unfolded experts have the names of files: only renamed, not merged.
        for converters in (self._converters, []):
            name, _ = rename_source_key(stored, self._renamings, converters, self._prefix, dict(self.wanted))
            names += [name, prefix + name, name.removeprefix(prefix)]
        return next((some for some in names if some in self.wanted), names[0])


@dataclass(frozen=True, slots=True)
class SortedNames:
    """The tensors of a checkpoint by what is done with them."""

    own: dict[str, str] = field(default_factory=dict)
    """Name in files → name in the model, of what the text model computes with."""
    parts: list[str] = field(default_factory=list)
    """Tensors of parts that are not text."""
    unread: list[str] = field(default_factory=list)
    """Tensors that no module of the model has."""
    strays: list[str] = field(default_factory=list)
    """Tensors that should not be there."""

    @property
    def copied(self) -> list[str]:
        """Everything that an export takes from its source byte for byte."""
        return [*self.parts, *self.unread]


def sort_names(model: PreTrainedModel, family: Family, stored: Iterable[str]) -> SortedNames:
    """Sort the tensors of a checkpoint. Tables that models compute themselves are left out.

    Args:
        model: on any device, the meta device included.
        family: its map.
        stored: names of the tensors of the files.
    """
    names, result = LoadedNames(model), SortedNames()
    judge = _Judge(model, family, names.wanted)
    loaded_names = {name: names.find(name) for name in stored}
    ordinary = judge.extra_layers(loaded_names.values())
    for name, loaded in loaded_names.items():
        if loaded in names.wanted and family.owns(loaded):
            result.own[name] = loaded
        elif judge.is_part(loaded):
            result.parts.append(name)
        elif judge.is_table(loaded):
            continue
        elif judge.is_overlooked(loaded):
            result.unread.append(name)
        else:
            wrong = judge.belongs_to_a_module(loaded) or judge.layer_of(loaded) in ordinary
            (result.strays if wrong else result.unread).append(name)
    return result


def roots(own: Iterable[str], unread: Iterable[str]) -> tuple[str, ...]:
    """Return the outermost names that unread tensors have for themselves: `mtp`, `model.layers.61`.

    Args:
        own: names in files of the tensors that the model has.
        unread: names in files of those that it has not.
    """
    taken = {beginning for name in own for beginning in _beginnings(name)}
    outermost = (next((some for some in _beginnings(name) if some not in taken), name) for name in unread)
    return tuple(dict.fromkeys(outermost))


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


class _Judge:
    """What a model says about the name of a tensor that it may not have."""

    def __init__(self, model: PreTrainedModel, family: Family, wanted: Mapping[str, Any]) -> None:
        self._family = family
        self._modules = {name for name, _ in model.named_modules()}
        self._ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        self._in_block = {self._relative(name) for name in wanted if self.layer_of(name) is not None}

    def layer_of(self, name: str) -> int | None:
        """Return the layer that a name says it is of."""
        index = name.removeprefix(f"{self._family.blocks}.").partition(".")[0]
        return int(index) if name.startswith(f"{self._family.blocks}.") and index.isdecimal() else None

    def is_part(self, name: str) -> bool:
        """Return whether a name is that of a part that is not text."""
        wrapper = self._family.wrapper
        return wrapper is not None and any(name == part or name.startswith(f"{part}.") for part in wrapper.parts)

    def is_table(self, name: str) -> bool:
        """Return whether a tensor is what the model computes itself, or an old mask that Transformers overlooks."""
        obsolete = any(re.search(pattern, name) for pattern in OBSOLETE_BUFFERS)
        return obsolete or (self.is_overlooked(name) and self._has_module(name))

    def is_overlooked(self, name: str) -> bool:
        """Return whether the model's class tells Transformers to overlook a tensor."""
        return any(pattern.search(name) for pattern in self._ignored)

    def belongs_to_a_module(self, name: str) -> bool:
        """Return whether the model has the module that a tensor would be of, or the block that it would be in."""
        layer = self.layer_of(name)
        return self._has_module(name) or (layer is not None and f"{self._family.blocks}.{layer}" in self._modules)

    def extra_layers(self, names: Iterable[str]) -> set[int | None]:
        """Return the layers beyond the model's that hold nothing but what ordinary blocks hold."""
        layers: dict[int, set[str]] = {}
        for name in names:
            layer = self.layer_of(name)
            if layer is not None and f"{self._family.blocks}.{layer}" not in self._modules:
                layers.setdefault(layer, set()).add(self._relative(name))
        return {layer for layer, inside in layers.items() if inside <= self._in_block}

    def _relative(self, name: str) -> str:
        return name.removeprefix(f"{self._family.blocks}.").partition(".")[2]

    def _has_module(self, name: str) -> bool:
        return name.rpartition(".")[0] in self._modules
