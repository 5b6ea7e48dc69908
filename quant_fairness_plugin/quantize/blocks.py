"""Calibration rows on their way through a model, block by block.

Each row has one hidden state. A block gets the same other arguments (masks, rotary embeddings, ALiBi, …) that the model
itself hands it, whatever its family calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import embedding_rows, position_limit
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.rehearsal import BlockCall, rehearse
from quant_fairness_plugin.model.stacks import Stacks, batches_in_memory
from quant_fairness_plugin.model.tokenizer import check_ids
from quant_fairness_plugin.quantize.calibration import CalibrationSet

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel  # loads Transformers, which a forecast does without


class Running(Protocol):
    """Rows of one language that a block can be run on."""

    @property
    def language(self) -> str:
        """The language of all rows."""

    def run(self, block: nn.Module, layer: int) -> Tensor:
        """Return the output of a block, `[rows, tokens, width]`."""


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


@dataclass(frozen=True, slots=True)
class _Stored:
    """A batch whose hidden states are read while it is run."""

    language: str
    read: Callable[[], Tensor]
    calls: tuple[BlockCall, ...]

    def run(self, block: nn.Module, layer: int) -> Tensor:
        """Return the output of a block, `[rows, tokens, width]`."""
        return self.calls[layer].run(block, self.read())


class Rows:
    """All calibration rows between two blocks: in memory as far as an allowance goes, else in files.

    In a folder to resume from, every batch is written after every block, and found again there.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: CalibrationSet,
        folder: Path,
        *,
        batch_tokens: int,
        allowance: int | None,
        durable: bool,
        name: str = "rows",
    ) -> None:
        """Open the rows; nothing is run yet.

        Args:
            loaded: the model, in evaluation mode.
            calibration: token rows.
            folder: for hidden states that are not held in memory; empty, or of an earlier run of the same work.
            batch_tokens: most tokens of a batch.
            allowance: bytes of hidden states in memory; None holds all.
            durable: whether the folder is one to resume from.
            name: of the files in it, where several streams of the same rows lie there.

        Raises:
            ConfigError, ArtifactError: as `first_inputs`.
        """
        _check_rows(loaded, calibration)
        self._loaded, self._rows = loaded, list(_batches(calibration, batch_tokens))
        width = linear_weight(loaded.block(0).get_submodule(loaded.family.modules(0)[0])).shape[1]
        shapes = [(len(rows), len(rows[0]), width) for _, rows in self._rows]
        sizes = [prod(shape) * loaded.model.dtype.itemsize for shape in shapes]
        held = frozenset(range(len(sizes))) if allowance is None else batches_in_memory(sizes, allowance)
        self._stacks = Stacks(
            folder, [f"{name}-{number:05d}" for number in range(len(sizes))], shapes, loaded.model.dtype,
            loaded.model.device, held, durable,
        )  # fmt: skip
        self._calls: list[tuple[BlockCall, ...]] = []

    @property
    def layer(self) -> int | None:
        """The block that the batch furthest behind reaches next; None where one has not entered the model."""
        stages = [self._stacks.stage(number) for number in range(len(self._rows))]
        return None if None in stages else min(stage for stage in stages if stage is not None)

    def enter(self, *, again: bool) -> None:
        """Bring every batch to the first block; with `again`, also those that an earlier run had brought further."""
        for number, (language, ids) in enumerate(self._rows):
            batch = _enter(self._loaded, language, ids)
            self._calls.append(batch.calls)
            if again or self._stacks.stage(number) is None:
                with self._stacks.next_stage(number, 0, 1) as following:
                    following.put(0, batch.hidden)

    def batches(self) -> list[Running]:
        """Return every batch as it stands before the block that it reaches next."""
        return [self._batch(number) for number in range(len(self._rows))]

    @torch.no_grad()
    def advance(self, layer: int, block: nn.Module) -> None:
        """Run a block on every batch that is not behind it yet."""
        for number in range(len(self._rows)):
            if self._stacks.stage(number) == layer:
                output = self._batch(number).run(block, layer)
                with self._stacks.next_stage(number, layer + 1, 1) as following:
                    following.put(0, output)

    def forget(self) -> None:
        """Remove what was kept to resume from."""
        for number in range(len(self._rows)):
            self._stacks.drop(number)

    def _batch(self, number: int) -> _Stored:
        return _Stored(self._rows[number][0], lambda: self._stacks.read(number, 0), self._calls[number])


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
    _check_rows(loaded, calibration)
    return [_enter(loaded, language, ids) for language, ids in _batches(calibration, batch_tokens)]


def _check_rows(loaded: LoadedModel, calibration: CalibrationSet) -> None:
    context = position_limit(loaded.model)
    longest = max(len(row) for rows in calibration.rows.values() for row in rows)
    if longest > context:
        raise ConfigError(
            f"a calibration row has {longest} tokens, the model's context {context}; build the calibration with "
            f"row_tokens of at most {context}"
        )
    tokens = {token for rows in calibration.rows.values() for row in rows for token in row}
    check_ids(loaded.tokenizer, tokens, rows=embedding_rows(loaded.model), name=calibration.source)


def _batches(calibration: CalibrationSet, batch_tokens: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    for language, rows in calibration.rows.items():
        for length in sorted({len(row) for row in rows}, reverse=True):
            equal = [row for row in rows if len(row) == length]
            step = max(1, batch_tokens // length)
            for start in range(0, len(equal), step):
                yield language, equal[start : start + step]


@torch.no_grad()
def _enter(loaded: LoadedModel, language: str, rows: list[tuple[int, ...]]) -> Batch:
    rehearsal = rehearse(loaded, torch.tensor(rows))
    return Batch(language, rehearsal.hidden, rehearsal.calls)
