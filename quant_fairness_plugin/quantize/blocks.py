"""Run a model block by block on calibration rows, and watch what its linear modules are given. Step 6 (quantize).

Takes a loaded model and a `CalibrationSet`; holds one hidden state per row and hands each block the same other
arguments (masks, rotary embeddings, ALiBi, …) that the model itself hands it, whatever its family calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.gptq import working_dtype


class _EnoughError(Exception):
    """Ends a forward pass at the place up to which it is needed."""


@dataclass(slots=True)
class Batch:
    """Rows of one language and one length on their way through the blocks."""

    language: str
    hidden: Tensor
    """`[rows, tokens, width]`, the input of the next block."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    """Per layer, what the block takes besides the hidden state."""

    def run(self, block: nn.Module, layer: int) -> Tensor:
        """The output of a block, `[rows, tokens, width]`."""
        positional, named = self.arguments[layer]
        output = block(self.hidden, *positional, **named)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden


@torch.no_grad()
def first_inputs(loaded: LoadedModel, calibration: CalibrationSet, *, batch_tokens: int) -> list[Batch]:
    """The calibration rows as they reach the first block, with every block's other arguments.

    Rows of equal length are run together, without padding, so every token counts once and nothing else does.

    Args:
        loaded: the model, in evaluation mode; not changed.
        calibration: token rows.
        batch_tokens: most tokens of a batch (a longer row is a batch of its own).

    Raises:
        ConfigError: a row is longer than the model's context.
    """
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    longest = max(len(row) for rows in calibration.rows.values() for row in rows)
    if context is not None and longest > context:
        raise ConfigError(
            f"a calibration row has {longest} tokens, the model's context {context}; build the calibration with "
            f"row_tokens of at most {context}"
        )
    return [_enter(loaded, language, ids) for language, ids in _batches(calibration, batch_tokens)]


def _batches(calibration: CalibrationSet, batch_tokens: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    for language, rows in calibration.rows.items():
        for length in sorted({len(row) for row in rows}, reverse=True):
            equal = [row for row in rows if len(row) == length]
            step = max(1, batch_tokens // length)
            for start in range(0, len(equal), step):
                yield language, equal[start : start + step]


def _enter(loaded: LoadedModel, language: str, rows: list[tuple[int, ...]]) -> Batch:
    """Run the model up to its last block and note what each block is called with."""
    batch = Batch(language, torch.empty(0))

    def note(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        hidden, *rest = positional or (named.pop("hidden_states"),)
        if not batch.arguments:
            batch.hidden = hidden
        batch.arguments.append((tuple(rest), named))
        if len(batch.arguments) == loaded.layers:
            raise _EnoughError

    blocks = (loaded.block(layer) for layer in range(loaded.layers))
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        loaded.model(torch.tensor(rows, device=loaded.model.device), use_cache=False)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return batch


@torch.no_grad()
def input_moment(
    block: nn.Module, module: nn.Module, layer: int, batches: Sequence[Batch], calibration: CalibrationSet
) -> Tensor:
    """The second moment of a module's inputs, `[cols, cols]`: the mean over languages of the mean over tokens of xxᵀ.

    Every language counts the same, however many tokens it has.

    Raises:
        UnsupportedModelError: the block does not give the module every token exactly once.
    """
    coverage = calibration.coverage
    seen = dict.fromkeys(coverage, 0)
    moment: Tensor | None = None
    language = ""

    def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
        nonlocal moment
        inputs = positional[0].detach().flatten(0, -2).float()
        seen[language] += len(inputs)
        if moment is None:
            columns = inputs.shape[1]
            moment = torch.zeros(columns, columns, dtype=working_dtype(inputs.device), device=inputs.device)
        moment.add_(inputs.T @ inputs, alpha=1 / (coverage[language] * len(coverage)))
        raise _EnoughError

    handle = module.register_forward_pre_hook(note)
    try:
        for batch in batches:
            language = batch.language
            _run_until_seen(block, layer, batch)
    finally:
        handle.remove()
    if moment is None or seen != coverage:
        raise UnsupportedModelError(
            f"the block gave the module {sum(seen.values())} of {sum(coverage.values())} calibration tokens; "
            "only blocks that give every module every token can be calibrated. Quantize with method 'rtn'"
        )
    return moment


def _run_until_seen(block: nn.Module, layer: int, batch: Batch) -> None:
    try:
        batch.run(block, layer)
    except _EnoughError:
        pass
