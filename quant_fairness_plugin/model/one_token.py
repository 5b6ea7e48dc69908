"""One token through all blocks: whether they can be run one by one."""

from __future__ import annotations

import torch

from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import check_independent, may_share, rehearse


@torch.no_grad()
def check_walkable(loaded: LoadedModel) -> None:
    """Refuse a model whose layers hand each other more than the hidden state. Blocks are run only where they could.

    Raises:
        UnsupportedModelError: as `check_independent`.
        QuantFairnessError: a block cannot be read.
    """
    start = rehearse(loaded, torch.zeros(1, 1, dtype=torch.long, device=loaded.model.device))
    if not any(map(may_share, start.calls)):
        return
    hidden, layers = start.hidden, range(loaded.layers)
    with block_feed(loaded, layers, prefetch=True) as resident:
        for layer in layers:
            with resident(layer):
                hidden = start.calls[layer].run(loaded.block(layer), hidden)
            check_independent(start.calls[layer])
