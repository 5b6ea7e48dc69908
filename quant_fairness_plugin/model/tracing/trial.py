"""A small random model and what was seen when it ran: which linear modules and norms read and wrote which tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.linear import is_linear, linear_weight
from quant_fairness_plugin.model.small import randomize

TOKENS = (5, 9, 77, 31, 120, 8, 44, 200, 3, 17)

Key = tuple[int, int, int]
"""Which tensor: where it begins, how many values it has, how often it was written to."""


@dataclass(frozen=True, slots=True)
class Event:
    """One call of a linear module or a norm."""

    name: str
    """Relative to the block."""
    linear: bool
    read: Key
    wrote: Key

    @property
    def parent(self) -> str:
        """The module that it is in; empty for the block itself."""
        return self.name.rpartition(".")[0]


class Trial:
    """A small model, and what was seen when it ran."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        """Run the model once, in float64 where its code takes that."""
        self.model, self.blocks = model, blocks_of(model, path)
        randomize(model)
        try:
            nn.Module.double(model)
            self.events = self._watch()
        except RuntimeError:  # code that mixes in float32 of its own
            nn.Module.float(model)
            self.events = self._watch()
        self.logits = self.run()
        self.key_heads = _key_heads(model)

    def run(self) -> Tensor:
        """Logits, `[1, tokens, vocabulary]`, or of a decoder without a head, its last hidden state."""
        embedding = self.model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        vocabulary = embedding.shape[0]
        ids = torch.tensor([[token % vocabulary for token in TOKENS]])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return logits

    def _watch(self) -> list[list[Event]]:
        events: list[list[Event]] = [[] for _ in self.blocks]
        alive: list[Tensor] = []  # a freed tensor's place is taken by another one
        hooks = []
        for layer, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if is_linear(module) or _is_norm(module):
                    note = partial(_note, name=name, events=events[layer], alive=alive)
                    hooks.append(module.register_forward_hook(note, with_kwargs=True))
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return events

    def distance(self) -> float:
        """How far the logits are from those of the model as it was, relative to the largest of these."""
        return float((self.run() - self.logits).abs().max() / self.logits.abs().max())

    def rows(self, layer: int, name: str) -> int:
        """How many outputs a linear module has."""
        return linear_weight(self.blocks[layer].get_submodule(name)).shape[0]

    def columns(self, layer: int, name: str) -> int:
        """How many inputs a linear module has."""
        return linear_weight(self.blocks[layer].get_submodule(name)).shape[1]

    @contextmanager
    def changed(self, layers: Sequence[int]) -> Iterator[None]:
        """Put the parameters of some blocks back at the end of a `with` block."""
        parameters = [parameter for layer in layers for parameter in self.blocks[layer].parameters()]
        values = [(parameter, parameter.detach().clone()) for parameter in parameters]
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter, value in values:
                parameter.detach().copy_(value)


def blocks_of(model: nn.Module, path: str) -> list[nn.Module]:
    """Return a model's blocks."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def _key_heads(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the numbers of heads of keys and values that the config says."""
    config = model.config.to_dict()
    counts = {value for key, value in config.items() if "head" in key and ("kv" in key or "key_value" in key)}
    return tuple(sorted(count for count in counts if type(count) is int and count > 0))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies by a vector and does nothing else with parameters."""
    weight = getattr(module, "weight", None)
    inside = [parameter for parameter in module.parameters() if parameter.dim() != 1]
    return isinstance(weight, nn.Parameter) and not inside and not list(module.children())


def _note(
    module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any,
    *, name: str, events: list[Event], alive: list[Tensor],
) -> None:  # fmt: skip
    read = next((value for value in (*given, *named.values()) if isinstance(value, Tensor)), None)
    wrote = output[0] if isinstance(output, tuple) else output
    if read is None or not isinstance(wrote, Tensor) or any(event.name == name for event in events):
        return
    alive += [read, wrote]
    events.append(Event(name, is_linear(module), _key(read), _key(wrote)))


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tensor.numel(), tensor._version
