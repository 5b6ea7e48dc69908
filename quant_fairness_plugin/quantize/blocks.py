"""Run a model block by block on calibration rows, and watch what its linear modules are given. Step 6 (quantize).

Takes a loaded model and a `CalibrationSet`; holds one hidden state per row and hands each block the same other
arguments (masks, rotary embeddings, ALiBi, …) that the model itself hands it, whatever its family calls them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import BlockCall, rehearse
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
    calls: tuple[BlockCall, ...]
    """Per layer, what the block takes besides the hidden state."""

    def run(self, block: nn.Module, layer: int) -> Tensor:
        """The output of a block, `[rows, tokens, width]`."""
        return self.calls[layer].run(block, self.hidden)


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
    rehearsal = rehearse(loaded, torch.tensor(rows))
    return Batch(language, rehearsal.hidden, rehearsal.calls)


@dataclass(frozen=True, slots=True)
class LanguageMoment:
    """What a module is given on the calibration text of one language. Modules of a fusion group share it."""

    language: str
    moment: Tensor
    """`[cols, cols]`: mean over tokens of xxᵀ."""
    magnitude: Tensor
    """`[cols]`: mean over tokens of |x|."""


@torch.no_grad()
def language_moments(
    block: nn.Module, module: nn.Module, layer: int, batches: Sequence[Batch], calibration: CalibrationSet
) -> Iterator[LanguageMoment]:
    """The statistics of a module's inputs, one language at a time, so that only one matrix is held here.

    Raises:
        UnsupportedModelError: the block does not give the module every token exactly once.
    """
    for language, tokens in calibration.coverage.items():
        seen = 0
        moment = magnitude = torch.empty(0)

        def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
            nonlocal seen, moment, magnitude
            inputs = positional[0].detach().flatten(0, -2).float()
            if not seen:
                columns, kind = inputs.shape[1], working_dtype(inputs.device)
                moment = torch.zeros(columns, columns, dtype=kind, device=inputs.device)
                magnitude = torch.zeros(columns, dtype=kind, device=inputs.device)
            seen += len(inputs)
            moment.add_(inputs.T @ inputs)
            magnitude.add_(inputs.abs().sum(0))
            raise _EnoughError

        handle = module.register_forward_pre_hook(note)
        try:
            for batch in batches:
                if batch.language == language:
                    _run_until_seen(block, layer, batch)
        finally:
            handle.remove()
        if seen != tokens:
            raise UnsupportedModelError(
                f"the block gave the module {seen} of {tokens} calibration tokens of {language}; "
                "only blocks that give every module every token can be calibrated. Quantize with method 'rtn'"
            )
        yield LanguageMoment(language, moment.div_(tokens), magnitude.div_(tokens))


def fair_moments(
    moments: Iterable[LanguageMoment], weights: Mapping[str, Tensor], shares: Mapping[str, float]
) -> dict[str, Tensor]:
    """Σ w_λ H_λ / tr(W H_λ Wᵀ), `[cols, cols]`: the Hessian of the fair objective, for each weight of a fusion group.

    Dividing by each language's own output energy leaves the shares alone to decide how much a language counts:
    otherwise one with larger activations would weigh more, whatever its share.

    Args:
        moments: one per language, used up one after another.
        weights: module → 16-bit weight `[rows, cols]`.
        shares: language → w_λ.

    Returns:
        Module → Hessian, in the order of `weights`.
    """
    totals: dict[str, Tensor] = {}
    for found in moments:
        for name, weight in weights.items():
            energy = output_energy(weight, found.moment)
            term = found.moment * (shares[found.language] / energy if energy > 0 else 0.0)
            totals[name] = totals[name].add_(term) if name in totals else term
    return totals


def output_energy(weight: Tensor, moment: Tensor) -> float:
    """tr(W H Wᵀ): the mean squared output of a weight `[rows, cols]` on inputs of second moment H."""
    wide = weight.to(moment.dtype)
    return float(((wide @ moment) * wide).sum())


def _run_until_seen(block: nn.Module, layer: int, batch: Batch) -> None:
    try:
        batch.run(block, layer)
    except _EnoughError:
        pass
