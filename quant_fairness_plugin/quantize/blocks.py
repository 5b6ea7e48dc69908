"""Calibration rows on their way through a model, block by block.

Each row has one hidden state. A block gets the same other arguments (masks, rotary embeddings, ALiBi, …) that the model
itself hands it, whatever its family calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import embedding_rows, position_limit
from quant_fairness_plugin.model.rehearsal import BlockCall, rehearse
from quant_fairness_plugin.model.tokenizer import check_ids
from quant_fairness_plugin.quantize.calibration import CalibrationSet

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel  # loads Transformers, which a forecast does without


@dataclass(slots=True)
class Batch:
    """Rows of one language and one length on their way through the blocks."""

    language: str
    hidden: Tensor
    """`[rows, tokens, width]`, the input of the next block."""
    calls: tuple[BlockCall, ...]
    """Per layer, what the block takes beside the hidden state."""

    def run(self, block: nn.Module, layer: int) -> Tensor:
        """Return the output of a block, `[rows, tokens, width]`."""
        return self.calls[layer].run(block, self.hidden)


@torch.no_grad()
def first_inputs(loaded: LoadedModel, calibration: CalibrationSet, *, batch_tokens: int) -> list[Batch]:
    """Return the calibration rows as they reach the first block, with every block's other arguments.

    Rows of equal length are run together, without padding, so every token counts once and nothing else does.

    Args:
        loaded: the model, in evaluation mode; not changed.
        calibration: token rows.
        batch_tokens: most tokens of a batch (a longer row is a batch by itself).

    Raises:
        ConfigError: a row is longer than the model's context.
        ArtifactError: a token that the model has no embedding for.
    """
    context = position_limit(loaded.model)
    longest = max(len(row) for rows in calibration.rows.values() for row in rows)
    if longest > context:
        raise ConfigError(
            f"a calibration row has {longest} tokens, the model's context {context}; build the calibration with "
            f"row_tokens of at most {context}"
        )
    tokens = {token for rows in calibration.rows.values() for row in rows for token in row}
    check_ids(loaded.tokenizer, tokens, rows=embedding_rows(loaded.model), name=calibration.source)
    return [_enter(loaded, language, ids) for language, ids in _batches(calibration, batch_tokens)]


def _batches(calibration: CalibrationSet, batch_tokens: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    for language, rows in calibration.rows.items():
        for length in sorted({len(row) for row in rows}, reverse=True):
            equal = [row for row in rows if len(row) == length]
            step = max(1, batch_tokens // length)
            for start in range(0, len(equal), step):
                yield language, equal[start : start + step]


def _enter(loaded: LoadedModel, language: str, rows: list[tuple[int, ...]]) -> Batch:
    rehearsal = rehearse(loaded, torch.tensor(rows))
    return Batch(language, rehearsal.hidden, rehearsal.calls)
