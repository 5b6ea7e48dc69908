"""A model whose text decoder is a part of it: where the decoder is, what the other parts are, and names on disk.

Vision towers, audio encoders and projectors are neither run nor quantized; an export copies them from its source.
Importing this module does not import torch; `find_wrapper` needs a model, and so does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Wrapper:
    """The parts of a model beside its text decoder and its head. Full names of the loaded model."""

    decoder: str
    """The text decoder, `model.language_model`."""
    head: str
    parts: tuple[str, ...]
    """The outermost modules that belong to neither: `model.vision_tower`, `model.multi_modal_projector`."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings of names of the decoder and the head that are others on disk: in the model, on disk; longest first."""

    def owns(self, name: str) -> bool:
        """Return whether a module or tensor belongs to the text decoder or the head."""
        return any(name == own or name.startswith(f"{own}.") for own in (self.decoder, self.head))

    def stored_name(self, name: str) -> str:
        """Return the name in files of a module or tensor of the decoder or the head."""
        return _exchanged(name, self.renamed)

    def loaded_name(self, name: str) -> str:
        """Return the name in the loaded model of a module or tensor of the decoder or the head in files."""
        inner = _exchanged(name, tuple((stored, loaded) for loaded, stored in self.renamed))
        return inner if self.owns(inner) else name


def find_wrapper(model: PreTrainedModel) -> Wrapper | None:
    """Return the parts of a model of which the text decoder is only one; None where the model is all text.

    Args:
        model: on any device, the meta device included.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return None
    path, head = _path(model, model.get_decoder()), _path(model, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if path in ("", model.base_model_prefix):
        return None
    own = Wrapper(path, head or path, ())
    names = [name for name in model.state_dict() if own.owns(name)]
    return Wrapper(path, head or path, tuple(_outside(model, "", own)), _renamings(model, names))


def _path(model: nn.Module, wanted: object) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _outside(module: nn.Module, prefix: str, own: Wrapper) -> Iterator[str]:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if own.owns(full):
            continue
        if any(kept.startswith(f"{full}.") for kept in (own.decoder, own.head)):
            yield from _outside(child, f"{full}.", own)
        else:
            yield full


def _renamings(model: PreTrainedModel, names: list[str]) -> tuple[tuple[str, str], ...]:
    """Return how the beginnings of names change when Transformers saves the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key

    # As Transformers saves a model that it did not load: what adds or takes off a prefix is for loading alone.
    changes = get_model_conversion_mapping(model, add_legacy=False)
    back = [change.reverse_transform() for change in reversed(changes) if not isinstance(change, PrefixChange)]
    renamings = [change for change in back if isinstance(change, WeightRenaming)]
    pairs = {_beginnings(name, rename_source_key(name, renamings, [], reverse=True)[0]) for name in names}
    return tuple(sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: (-len(pair[0]), pair)))


def _beginnings(loaded: str, stored: str) -> tuple[str, str]:
    """Return two names without what they have in common at their ends; one part of each is left."""
    first, second = loaded.split("."), stored.split(".")
    while len(first) > 1 and len(second) > 1 and first[-1] == second[-1]:
        del first[-1], second[-1]
    return ".".join(first), ".".join(second)


def _exchanged(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in sorted(pairs, key=lambda pair: -len(pair[0])):
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
