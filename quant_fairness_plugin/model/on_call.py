"""A model whose blocks are in files, called as any model is: each block is read when the model calls it.

What runs a model itself (Transformers' `generate`) has no place for a loop over blocks. A pass takes the time of
reading all blocks, so many rows should share it. No block stays: those of a small model come from the system's cache
of files, which takes a fraction of computing with them and none of this process's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.model.freed import return_free_pages, returned_when_freed
from quant_fairness_plugin.model.in_blocks import VOCABULARY_PIECE
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.model.tables import Table

LONG_TOKENS = 256
"""Tokens of a call behind which free memory goes back after every block; else after the last one."""


@contextmanager
def read_on_call(streamed: StreamedModel) -> Iterator[None]:
    """Let the model be called as a whole while the context is open: its blocks and its head are read as they are run.

    Calls must not overlap.
    """
    with ExitStack() as hooks:
        for layer in range(streamed.layers):
            hooks.enter_context(_block_read_on_call(streamed, layer))
        table = streamed.tables.get(f"{streamed.family.head}.weight")
        if table is not None:
            hooks.enter_context(_head_read_on_call(streamed.model.get_submodule(streamed.family.head), table))
        hooks.enter_context(returned_when_freed())  # what a model remembers of a pass lies between its blocks
        yield


@contextmanager
def _block_read_on_call(streamed: StreamedModel, layer: int) -> Iterator[None]:
    block, held = streamed.block(layer), ExitStack()

    def read(*_: Any) -> None:
        held.enter_context(streamed.resident(layer))

    def leave(_: nn.Module, given: tuple[Any, ...], __: Any) -> None:
        held.close()
        # Of a prompt, every block leaves much more than of the token after it; of that, all blocks together.
        tokens = given[0].shape[:-1].numel() if given else 0
        if layer + 1 == streamed.layers or tokens >= LONG_TOKENS:
            return_free_pages()

    before = block.register_forward_pre_hook(read)
    after = block.register_forward_hook(leave, always_call=True)  # after an error, too
    try:
        yield
    finally:
        before.remove()
        after.remove()
        held.close()


@contextmanager
def _head_read_on_call(head: nn.Module, table: Table) -> Iterator[None]:
    def logits(hidden: Tensor) -> Tensor:
        bias: Tensor | None = getattr(head, "bias", None)
        pieces = []
        for start in range(0, table.place.shape[0], VOCABULARY_PIECE):
            part = slice(start, min(start + VOCABULARY_PIECE, table.place.shape[0]))
            pieces.append(nn.functional.linear(hidden, table.part(part), None if bias is None else bias[part]))
        return torch.cat(pieces, dim=-1)

    forward: Callable[[Tensor], Tensor] = logits
    head.forward = forward  # calls of the module look it up on the instance first
    try:
        yield
    finally:
        del head.forward
