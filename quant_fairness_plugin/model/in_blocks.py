"""How large activations get in a model that is run block by block; the same question as in `activations`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quant_fairness_plugin.model.activations import ActivationWatch
from quant_fairness_plugin.model.freed import return_free_pages
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import head_input, rehearse

VOCABULARY_PIECE = 4096
"""Rows of the head that are read at once."""


@torch.no_grad()
def largest_activation_by_blocks(
    loaded: LoadedModel,
    rows: Sequence[Sequence[int]],
    *,
    resident: Callable[[int], AbstractContextManager[None]],
    head_rows: Callable[[slice], Tensor],
) -> float:
    """Return the largest magnitude among what the modules of a model are given and return; infinity where one is NaN.

    Args:
        loaded: the model, in float32.
        rows: token ids.
        resident: makes a block ready to be run.
        head_rows: returns rows of the head's weight, `[rows, width]`.
    """
    ids = [torch.tensor([row], device=loaded.model.device) for row in rows]
    starts = [rehearse(loaded, row) for row in ids]
    hidden, watch = [start.hidden for start in starts], ActivationWatch()
    for layer in range(loaded.layers):
        with resident(layer), watch.over(loaded.block(layer)):
            hidden = [s.calls[layer].run(loaded.block(layer), h) for s, h in zip(starts, hidden, strict=True)]
        return_free_pages()
    given = [head_input(loaded, row, None, last) for row, last in zip(ids, hidden, strict=True)]
    head = loaded.model.get_submodule(loaded.family.head)
    bias = getattr(head, "bias", None)
    vocabulary = len(head.get_parameter("weight"))
    for start in range(0, vocabulary, VOCABULARY_PIECE):
        part = slice(start, min(start + VOCABULARY_PIECE, vocabulary))
        weight = head_rows(part)
        for value in given:
            watch.see(torch.nn.functional.linear(value, weight, None if bias is None else bias[part]))
    for value in (*hidden, *given, *(start.hidden for start in starts)):
        watch.see(value)
    return watch.largest
