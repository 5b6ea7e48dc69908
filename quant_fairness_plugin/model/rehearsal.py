"""Running a model's blocks one by one from outside: what each block is called with, and what follows the last.

Every family hands its blocks other arguments (masks, rotary embeddings, ALiBi, …) and does something else before the
first and after the last. Instead of a description per family, the model itself is *rehearsed*: run with blocks that
only note their arguments and pass the hidden state on, which costs an embedding lookup and a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant_fairness_plugin.model.load import LoadedModel


class EnoughError(Exception):
    """Ends a forward pass at the place up to which it is needed."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a block is called with besides the hidden state."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The output of a block for `hidden`, `[rows, tokens, width]`."""
        output = block(hidden, *self.positional, **self.named)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A batch on its way to the first block."""

    hidden: Tensor
    """`[rows, tokens, width]`, what the first block is given."""
    calls: tuple[BlockCall, ...]
    """One per layer."""


@torch.no_grad()
def rehearse(loaded: LoadedModel, ids: Tensor, mask: Tensor | None = None) -> Rehearsal:
    """What every block would be called with for a batch. No block is run but the first, on one token.

    Args:
        loaded: the model, in evaluation mode; not changed.
        ids: token ids `[rows, tokens]`.
        mask: attention mask `[rows, tokens]`, or None.
    """
    entered: list[Tensor] = []
    calls: list[BlockCall] = []

    def note(layer: int, hidden: Tensor, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        if not entered:
            entered.append(hidden)
        calls.append(BlockCall(positional, named))
        if layer == loaded.layers - 1:
            raise EnoughError
        return hidden

    with _played_by(loaded, note):
        _run(loaded, ids, mask)
    return Rehearsal(entered[0], tuple(calls))


def check_independent(call: BlockCall) -> None:
    """Refuse a call in which layers hand each other more than the hidden state, once they have run.

    Raises:
        UnsupportedModelError: a layer is given what earlier ones wrote down.
    """
    if any(_is_filled(value) for value in (*call.positional, *call.named.values())):
        raise UnsupportedModelError(
            "layers of this model take keys and values from earlier ones, which plans that differ there cannot share "
            "in one walk; models whose layers only hand on a hidden state are swept. Name the layers to protect."
        )


def may_share(call: BlockCall) -> bool:
    """Return whether a call hands on something that layers can write into, beside the hidden state."""
    return any(_holds_mapping(value) for value in (*call.positional, *call.named.values()))


def _holds_mapping(value: Any) -> bool:
    return any(map(_holds_mapping, value)) if isinstance(value, tuple) else isinstance(value, MutableMapping)


def _is_filled(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_filled, value))
    return isinstance(value, MutableMapping) and bool(value)


def head_input(loaded: LoadedModel, ids: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
    """What the output head is given where the last block's output is `hidden`, `[rows, tokens, width]`.

    Gradients flow through it where they are enabled.

    Args:
        loaded: the model.
        ids: token ids `[rows, tokens]`; their values do not matter, as their embeddings are thrown away.
        mask: attention mask, or None.
        hidden: the output of the last block.
    """
    inputs: list[Tensor] = []

    def replace(layer: int, passed: Tensor, positional: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        return hidden if layer == loaded.layers - 1 else passed

    def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
        inputs.append(positional[0])
        raise EnoughError

    handle = loaded.model.get_submodule(loaded.family.head).register_forward_pre_hook(note)
    try:
        with _played_by(loaded, replace):
            _run(loaded, ids, mask)
    finally:
        handle.remove()
    return inputs[0]


Rule = Callable[[Tensor], Tensor]
"""What a model does to the logits after its head, value by value."""


def logit_rule(loaded: LoadedModel) -> Rule | None:
    """Return what the model does to the output of its head; None where it is the logits. No block is run but the first.

    Raises:
        UnsupportedModelError: it is neither a factor nor a soft cap.
    """
    with _played_by(loaded, lambda layer, hidden, positional, named: hidden):
        return model_logit_rule(loaded.model, loaded.model.get_submodule(loaded.family.head))


@torch.no_grad()
def model_logit_rule(model: PreTrainedModel, head: nn.Module) -> Rule | None:
    """Return what a model does to the output of its head, seen on one token whose head output is known.

    Raises:
        UnsupportedModelError: it is neither a factor nor a soft cap.
    """
    weight = head.get_parameter("weight")
    given = torch.linspace(-100, 100, len(weight)).to(model.device, model.dtype)
    plain = head.__dict__.get("forward")
    head.forward = lambda hidden: given.expand(*hidden.shape[:-1], -1)
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        del head.forward
        if plain is not None:
            head.forward = plain
    known, seen = given.float(), logits.float()
    if torch.equal(known, seen):
        return None
    factor, cap = float(seen[-1] / known[-1]), getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    rules: list[Rule] = [lambda logits: logits * factor]
    if cap:
        rules.append(lambda logits: torch.tanh(logits / cap) * cap)
    # What the model computes in its own dtype differs from float32 by one rounding.
    close = [rule for rule in rules if torch.allclose(rule(known), seen, rtol=torch.finfo(model.dtype).eps, atol=0)]
    if not close:
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits after the head, and in another way than by a factor or a soft "
            "cap, which are accepted. Use a model whose head gives the logits."
        )
    return close[0]


def _run(loaded: LoadedModel, ids: Tensor, mask: Tensor | None) -> None:
    device = loaded.model.device
    with suppress(EnoughError):
        loaded.model(
            input_ids=ids.to(device), attention_mask=None if mask is None else mask.to(device), use_cache=False
        )


Part = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


@contextmanager
def _played_by(loaded: LoadedModel, part: Part) -> Iterator[None]:
    """All blocks replaced by `part(layer, hidden, positional, named)` while the context is open."""
    tupled = _returns_tuple(loaded)

    def forward(layer: int) -> Callable[..., Any]:
        def play(*positional: Any, **named: Any) -> Any:
            hidden, *rest = positional or (named.pop("hidden_states"),)
            output = part(layer, hidden, tuple(rest), named)
            return (output,) if tupled else output

        return play

    blocks = [loaded.block(layer) for layer in range(loaded.layers)]
    try:
        for layer, block in enumerate(blocks):
            block.forward = forward(layer)
        yield
    finally:
        for block in blocks:
            del block.forward


def _returns_tuple(loaded: LoadedModel) -> bool:
    """Whether blocks return `(hidden, …)` or the hidden state itself, seen on one token."""
    outputs: list[Any] = []

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)
        raise EnoughError

    handle = loaded.block(0).register_forward_hook(note)
    try:
        _run(loaded, torch.zeros(1, 1, dtype=torch.long), None)
    finally:
        handle.remove()
    return isinstance(outputs[0], tuple | list)
