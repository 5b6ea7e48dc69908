"""One token through all blocks: whether they can be run one by one."""

from __future__ import annotations

import torch

from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import check_independent, rehearse


@torch.no_grad()
def check_walkable(loaded: LoadedModel) -> None:
    """Refuse a model whose layers hand each other more than the hidden state.

    Raises:
        UnsupportedModelError: as `check_independent`.
        QuantFairnessError: a block cannot be read.
    """
    start, layers = (
        rehearse(loaded, torch.zeros(1, 1, dtype=torch.long, device=loaded.model.device)),
        range(loaded.layers),
    )
    hidden = start.hidden
    with block_feed(loaded, layers, prefetch=True) as resident:
        for layer in layers:
            with resident(layer):
                hidden = start.calls[layer].run(loaded.block(layer), hidden)
            check_independent(start.calls[layer])
