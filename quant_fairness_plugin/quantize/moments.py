"""The second moments of what a linear module is given, language by language, and what the methods need of them.

A block is run on the calibration rows of one language after the other (`language_moments`), so that the matrices
`[cols, cols]` of one language are held at a time. As the stream passes, three things are made of it: the Hessian of the
fair objective (`fair_moments`: GPTQ, AWQ), the mean input magnitude (`FairMagnitude`: AWQ), and, for the language-aware
clip, the diagonal blocks of every language's matrix (`MomentWatch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError, UnsolvableError, UnsupportedModelError
from quant_fairness_plugin.model.rehearsal import EnoughError
from quant_fairness_plugin.model.storage import all_finite
from quant_fairness_plugin.quantize.blocks import Running
from quant_fairness_plugin.quantize.calibration import CalibrationSet

MOST_GRAM_COLUMNS = 4096
"""Up to so many input channels, WᵀW is held over the languages (134 MB in float64), which saves a product for each."""
WIDE_COLUMNS = 4096
"""Beyond so many input channels a CPU works in float32, too: matrices of 8192 channels take half a gigabyte each in
float64, and several are held at once."""
_ADDED_ROWS = 256
"""Rows of a matrix that are weighed at once, while it is added to another."""
WIDEST_BLOCK = 128
"""Channels of a block where one scale serves a whole row: what lies between the blocks is left out there."""


@dataclass(frozen=True, slots=True)
class LanguageMoment:
    """What a module is given on the calibration text of one language. Modules of a fusion group share it."""

    language: str
    moment: Tensor
    """`[cols, cols]`: mean over tokens of xxᵀ."""
    magnitude: Tensor
    """`[cols]`: mean over tokens of |x|."""
    across: Tensor | None = None
    """`[cols, cols]`: mean over tokens of (x₁₆ - x)xᵀ, where x₁₆ is what the module is given in the 16-bit model; None
    where nobody asked for it."""


@dataclass(frozen=True, slots=True)
class Original:
    """A block as it was, and the calibration rows as they reach it in the 16-bit model."""

    block: nn.Module
    batches: Sequence[Running]
    """The same rows in the same order as those of the quantized model."""


@torch.no_grad()
def language_moments(
    block: nn.Module,
    module: nn.Module,
    layer: int,
    batches: Sequence[Running],
    calibration: CalibrationSet,
    original: Original | None = None,
) -> Iterator[LanguageMoment]:
    """Yield the statistics of a module's inputs, one language at a time, so that those of one are held here.

    Args:
        block: as far as it is quantized.
        module: one of its modules.
        layer: which block it is.
        batches: the calibration rows as they reach the block.
        calibration: the same rows as tokens.
        original: to compare the module's inputs with those that it has in the 16-bit model; None does not.

    Raises:
        UnsupportedModelError: the block does not give the module every token exactly once.
    """
    twin = None if original is None else original.block.get_submodule(_name_in(block, module))
    for language, tokens in calibration.coverage.items():
        seen, total = 0, _Sums()
        for number, batch in enumerate(batches):
            if batch.language == language:
                for given in _inputs(block, module, layer, batch):
                    right: Sequence[Tensor] = ()
                    if original is not None and twin is not None:
                        right = _inputs(original.block, twin, layer, original.batches[number])
                    total.add(given, *right)
                    seen += len(given)
        if seen != tokens:
            raise UnsupportedModelError(
                f"the block gave the module {seen} of {tokens} calibration tokens of {language}; "
                "only blocks that give every module every token can be calibrated. Quantize with method 'rtn'"
            )
        yield total.mean(language, tokens)


def _name_in(block: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, candidate in block.named_modules() if candidate is module)
    return name


def _inputs(block: nn.Module, module: nn.Module, layer: int, batch: Running) -> list[Tensor]:
    """What a block gives a module the first time on a batch, float32 `[tokens, cols]`; empty where it does not."""
    found: list[Tensor] = []

    def note(_: nn.Module, positional: tuple[Any, ...]) -> None:
        found.append(positional[0].detach().flatten(0, -2).float())
        raise EnoughError

    handle = module.register_forward_pre_hook(note)
    try:
        with suppress(EnoughError):
            batch.run(block, layer)
    finally:
        handle.remove()
    return found


class _Sums:
    """Statistics of one language, summed over tokens."""

    def __init__(self) -> None:
        self._moment = self._magnitude = torch.empty(0)
        self._across: Tensor | None = None

    def add(self, given: Tensor, right: Tensor | None = None) -> None:
        """Add a batch, `[tokens, cols]`, and where asked for what it is in the 16-bit model."""
        columns, kind = given.shape[1], working_dtype(given.device, given.shape[1])
        if not len(self._moment):
            self._moment = torch.zeros(columns, columns, dtype=kind, device=given.device)
            self._magnitude = torch.zeros(columns, dtype=kind, device=given.device)
            self._across = None if right is None else torch.zeros_like(self._moment)
        self._moment.add_(given.T @ given)
        self._magnitude.add_(given.abs().sum(0))
        if self._across is not None and right is not None:
            self._across.add_((right - given).T @ given)

    def mean(self, language: str, tokens: int) -> LanguageMoment:
        """Return what was summed as means; the sums are used up."""
        across = None if self._across is None else self._across.div_(tokens)
        return LanguageMoment(language, self._moment.div_(tokens), self._magnitude.div_(tokens), across)


@dataclass(frozen=True, slots=True)
class FairMoments:
    """What the languages of a calibration say together of the inputs of a fusion group, per weight."""

    hessians: dict[str, Tensor]
    """Module → Σ w_λ H_λ / tr(W H_λ Wᵀ), `[cols, cols]`."""
    across: dict[str, Tensor]
    """Module → the same sum of (x₁₆ - x)xᵀ, `[cols, cols]`; empty where inputs were not compared."""


def fair_moments(
    moments: Iterable[LanguageMoment], weights: Mapping[str, Tensor], shares: Mapping[str, float]
) -> FairMoments:
    """Return Σ w_λ H_λ / tr(W H_λ Wᵀ), `[cols, cols]`: the Hessian of the fair objective, per weight of a fusion group.

    Dividing by each language's output energy leaves the shares alone to decide how much a language counts:
    otherwise one with larger activations would weigh more, whatever its share.

    Args:
        moments: one per language, used up one after another.
        weights: module → 16-bit weight `[rows, cols]`.
        shares: language → w_λ.

    Returns:
        Hessians, and with them `across`, in the order of `weights`.
    """
    totals: dict[str, Tensor] = {}
    across: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    for statistics in moments:
        for name, weight in weights.items():
            if name not in grams and len(statistics.moment) <= MOST_GRAM_COLUMNS:
                wide = weight.to(statistics.moment.dtype)
                grams[name] = wide.T @ wide
            gram = grams.get(name)
            energy = output_energy(weight, statistics.moment) if gram is None else _trace(gram, statistics.moment)
            share = shares[statistics.language] / energy if energy > 0 else 0.0
            _add(totals, name, statistics.moment, share)
            if statistics.across is not None:
                _add(across, name, statistics.across, share)
    return FairMoments(totals, across)


def _add(totals: dict[str, Tensor], name: str, term: Tensor, share: float) -> None:
    """Add a share of a matrix, some rows at a time: a product of all of them would be one more matrix."""
    total = totals.get(name)
    if total is None:
        total = totals[name] = torch.zeros_like(term)
    for rows, added in zip(torch.split(total, _ADDED_ROWS), torch.split(term, _ADDED_ROWS), strict=True):
        rows.add_(added * share)


def _trace(one: Tensor, other: Tensor) -> float:
    """Return tr(A B) of two symmetric matrices."""
    return float(torch.dot(one.flatten(), other.flatten()))


def output_energy(weight: Tensor, moment: Tensor) -> float:
    """Return tr(W H Wᵀ): the mean squared output of a weight `[rows, cols]` on inputs of second moment H."""
    wide = weight.to(moment.dtype)
    return float(((wide @ moment) * wide).sum())


def working_dtype(device: torch.device, columns: int) -> torch.dtype:
    """Return the dtype of Hessians and solutions of so many input channels.

    That is float64 on a CPU up to `WIDE_COLUMNS`, and float32 elsewhere: GPUs may run float64 64 times slower.
    """
    return torch.float64 if device.type == "cpu" and columns <= WIDE_COLUMNS else torch.float32


def check_finite(*moments: Tensor) -> None:
    """Refuse moments of inputs that no solution can be found on.

    Raises:
        UnsolvableError: one of them holds NaN or infinity.
    """
    if not all(map(all_finite, moments)):
        raise UnsolvableError(
            "the inputs of the module held NaN or infinity on the calibration text; "
            "quantize with method 'rtn', or protect the layer"
        )


class FairMagnitude:
    """Σ w_λ a_λ / mean(a_λ): the input magnitude per channel, mixed over languages as their moments pass by."""

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._shares = shares
        self._total = torch.zeros(())

    def watch(self, moments: Iterable[LanguageMoment]) -> Iterator[LanguageMoment]:
        """Yield the same moments; each language's magnitude is noted, so that its moment need not be held."""
        for statistics in moments:
            mean = statistics.magnitude.mean()
            share = self._shares[statistics.language] / mean if mean > 0 else 0.0
            self._total = self._total.to(statistics.magnitude) + statistics.magnitude * share
            yield statistics

    @property
    def value(self) -> Tensor:
        """`[cols]`, mean 1."""
        return self._total.float()


@dataclass(frozen=True, slots=True)
class GroupMoments:
    """Second moments of a module's inputs, per language, within blocks of neighbouring channels."""

    blocks: Tensor
    """float32 `[languages, blocks, width, width]`: mean over tokens of xxᵀ; the last block is filled up with 0."""
    energies: Tensor
    """float32 `[languages]`: mean squared output of the 16-bit module, tr(W H Wᵀ)."""

    def worst_error(self, error: Tensor) -> Tensor:
        """Return the largest over languages of each group's output error, as a share of the language's output energy.

        Args:
            error: 16-bit minus quantized weight `[rows, groups, group size]`.

        Returns:
            float32 `[rows, groups]`.

        Raises:
            ConfigError: the moments are those of another number of channels.
        """
        rows, groups, size = error.shape
        _, count, width, _ = self.blocks.shape
        spare = count * width - groups * size
        if not 0 <= spare < width:
            raise ConfigError(
                f"the moments of {count} blocks of {width} channels do not fit a weight of {groups * size} columns; "
                "build them from the same module"
            )
        by_block = pad(error.reshape(rows, -1).float(), (0, spare)).view(rows, count, width).transpose(0, 1)
        worst = torch.zeros(rows, groups, device=error.device)
        for blocks, energy in zip(self.blocks, self.energies.tolist(), strict=True):
            if energy > 0:  # a language in which the module has no output cannot be hurt
                lost = (torch.bmm(by_block, blocks) * by_block).sum(2).T.reshape(rows, groups, -1).sum(2)
                worst = torch.maximum(worst, lost / energy)
        return worst


class MomentWatch:
    """The diagonal blocks of the moments that pass, for the modules of one fusion group."""

    def __init__(self, weights: Mapping[str, Tensor], grids: Mapping[str, Grid]) -> None:
        """Watch for the modules whose grid clips by language; without one, nothing is held.

        Args:
            weights: module → 16-bit weight `[rows, cols]`; they share their inputs.
            grids: module → its grid; of one group size.
        """
        self._weights = {name: weight for name, weight in weights.items() if grids[name].clip == "minimax"}
        self._group_size = grids[next(iter(weights))].group_size
        self._blocks: list[Tensor] = []
        self._energies: dict[str, list[float]] = {name: [] for name in self._weights}

    def watch(self, moments: Iterable[LanguageMoment]) -> Iterator[LanguageMoment]:
        """Yield the same moments, one after another, none of them held."""
        for statistics in moments:
            if self._weights:
                self._blocks.append(diagonal_blocks(statistics.moment, self._group_size))
            for name, weight in self._weights.items():
                self._energies[name].append(output_energy(weight, statistics.moment))
            yield statistics

    def inputs(self, name: str) -> GroupMoments | None:
        """Return what has passed, for one module; None where its grid has no use for it."""
        if name not in self._weights:
            return None
        blocks = torch.stack(self._blocks)
        return GroupMoments(blocks, torch.tensor(self._energies[name], dtype=torch.float32, device=blocks.device))


def diagonal_blocks(moment: Tensor, group_size: int) -> Tensor:
    """Return the diagonal blocks of a matrix, one per group, or of `WIDEST_BLOCK` channels where a row is one group.

    Args:
        moment: `[cols, cols]`, not changed.
        group_size: input channels per scale, -1 for all of a row.

    Returns:
        float32 `[blocks, width, width]`, a copy; the last block is filled up with 0.
    """
    columns = len(moment)
    width = group_size if group_size != -1 else min(columns, WIDEST_BLOCK)
    starts = range(0, columns, width)
    blocks = [moment[start : start + width, start : start + width].float() for start in starts]
    return torch.stack([pad(block, (0, width - len(block), 0, width - len(block))) for block in blocks])
