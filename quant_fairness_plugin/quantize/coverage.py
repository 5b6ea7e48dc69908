"""Count where a mixture of experts routes the tokens of every language: in the calibration text, and in text it meets.

Routing is that of the 16-bit model: quantized layers route a little differently, and every plan otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import ExpertCoverage, Part, TextSet, Unit
from quant_fairness_plugin.artifacts.experts import Counts
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import position_limit, tokenize_for
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.experts import Experts, expert_modules
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import rehearse
from quant_fairness_plugin.quantize.calibration import CalibrationSet

BATCH_TOKENS = 2048
HELD_VALUES = 1 << 26
"""Of hidden states between two blocks, 256 MiB in float32; what is more takes another pass through all blocks."""
CONTEXT = 512
DIGITS = 5
Row = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Where the tokens of some rows go."""

    tokens: Tensor
    """int64 `[rows, layers, experts]`: of the layers that have experts."""
    gates: Tensor
    """float64 `[rows, layers, experts]`: sums of gate weights."""


def expert_coverage(
    loaded: LoadedModel, calibration: CalibrationSet, texts: TextSet, *, part: Part = "confirm"
) -> ExpertCoverage | None:
    """Return the tokens per expert and language of a calibration, and of a part of the text set.

    Args:
        loaded: the 16-bit model; not changed.
        calibration: token rows.
        texts: the whole text set.
        part: the sentences that say which experts a language uses.

    Returns:
        The counts; None for a model without experts.
    """
    places = _places(loaded)
    if not places:
        return None
    chosen = texts.part(part)
    tokenized = tokenize_for(loaded.model, loaded.tokenizer, chosen, context=min(CONTEXT, position_limit(loaded.model)))
    rows = {name: tuple(row.ids for row in tokenized.rows if row.language == name) for name in chosen.languages}
    used = {language: count_rows(loaded, some) for language, some in rows.items()}
    calibrated = {language: count_rows(loaded, some) for language, some in calibration.rows.items()}
    gates = {language: counts.gates.sum(0) for language, counts in used.items()}
    return ExpertCoverage(
        experts=len(next(iter(places.values()))),
        calibrated=_counts(places, calibrated),
        reached=_counts(places, used),
        gates={
            layer: {
                language: tuple(round(share, DIGITS) for share in (sums[i] / sums[i].sum()).tolist())
                for language, sums in gates.items()
            }
            for i, layer in enumerate(places)
        },
        part=part,
    )


def reach_experts(
    loaded: LoadedModel, calibration: CalibrationSet, whole: CalibrationSet, *, enough: int
) -> CalibrationSet:
    """Return a calibration with rows added until every expert has enough tokens, as far as the text reaches them.

    The rows whose tokens are missing most come first, of whichever language; the weights of the languages stay what
    they were, so that a language with more rows counts no more.

    Args:
        loaded: the 16-bit model; not changed.
        calibration: token rows.
        whole: all rows that there are, of the same text in the same order.
        enough: tokens that every expert of every layer should have, of all languages together.

    Raises:
        ConfigError: the model has no experts, or no such number of tokens.
    """
    if not _places(loaded) or enough < 1:
        raise ConfigError(
            f"tokens_per_expert {enough}: the model has {len(_places(loaded))} layers with experts; accepted are 1 or "
            "more tokens for a mixture of experts. Leave it out"
        )
    spare = [(name, row) for name, rows in calibration.rows.items() for row in whole.rows[name][len(rows) :]]
    chosen = [row for rows in calibration.rows.values() for row in rows]
    missing = (enough - count_rows(loaded, chosen).tokens.sum(0)).clamp(min=0)
    offered = count_rows(loaded, [row for _, row in spare]).tokens
    added: dict[str, list[Row]] = {name: [] for name in calibration.rows}
    while len(offered):
        gains = offered.minimum(missing).sum((1, 2))
        best = int(gains.argmax())
        if not gains[best]:
            break
        missing = (missing - offered[best]).clamp(min=0)
        name, row = spare[best]
        added[name].append(row)
        offered[best] = 0
    rows = {name: (*rows, *added[name]) for name, rows in calibration.rows.items()}
    # Which documents are in a row is not known here: where any row was added, all count as used.
    source = whole if any(added.values()) else calibration
    return replace(calibration, rows=rows, weights=calibration.shares, starts=source.starts, sentences=source.sentences)


def _places(loaded: LoadedModel) -> dict[str, Experts]:
    """Return the experts of every layer that has some, by the layer's name in plans."""
    depth = loaded.family.blocks.count(".") + 1
    return {str(Unit(int(name.split(".")[depth]))): experts for name, experts in expert_modules(loaded.model)}


def _counts(places: Mapping[str, Experts], by_language: Mapping[str, RowCounts]) -> Counts:
    totals = {language: counts.tokens.sum(0).tolist() for language, counts in by_language.items()}
    return {
        layer: {language: tuple(numbers[i]) for language, numbers in totals.items()} for i, layer in enumerate(places)
    }


@torch.no_grad()
def count_rows(loaded: LoadedModel, rows: Sequence[Row]) -> RowCounts:
    """Run token rows through a mixture and count where they go.

    Args:
        loaded: the model; not changed.
        rows: token ids, of any lengths; rows of equal length are run together, without padding.
    """
    modules = list(_places(loaded).values())
    shape = len(rows), len(modules), len(modules[0])
    tokens, gates = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
    at: list[int] = []

    def note(layer: int) -> Any:
        def hook(module: nn.Module, positional: tuple[Any, ...]) -> None:
            assert isinstance(module, Experts)
            if not at:  # a rehearsal
                return
            routing = module.routing(positional)
            chosen, weights = routing.chosen.cpu().view(len(at), -1), routing.weights.cpu().double().view(len(at), -1)
            counted = torch.zeros(len(at), shape[2], dtype=torch.int64).scatter_add_(1, chosen, torch.ones_like(chosen))
            tokens[at, layer] = counted
            gates[at, layer] = torch.zeros(len(at), shape[2], dtype=torch.float64).scatter_add_(1, chosen, weights)

        return hook

    handles = [module.register_forward_pre_hook(note(layer)) for layer, module in enumerate(modules)]
    try:
        for some in _portions(list(_batches(rows)), rows, loaded):
            _run_through(loaded, [(numbers, [rows[i] for i in numbers]) for numbers in some], at)
    finally:
        for handle in handles:
            handle.remove()
    return RowCounts(tokens, gates)


def _portions(batches: Sequence[list[int]], rows: Sequence[Row], loaded: LoadedModel) -> Iterator[list[list[int]]]:
    """Yield as many batches together as may be held between two blocks."""
    width, held, some = loaded.model.config.get_text_config().hidden_size, 0, list[list[int]]()
    for numbers in batches:
        size = len(numbers) * len(rows[numbers[0]]) * width
        if some and held + size > HELD_VALUES:
            yield some
            held, some = 0, []
        held += size
        some.append(numbers)
    yield from [some] if some else []


def _run_through(loaded: LoadedModel, batches: Sequence[tuple[list[int], list[Row]]], at: list[int]) -> None:
    """Run batches through all blocks, one block in memory at a time where it is read from its file.

    Args:
        loaded: the model.
        batches: numbers of rows, and the rows.
        at: is set to the numbers of the batch that is running.
    """
    starts = [rehearse(loaded, torch.tensor(some, device=loaded.model.device)) for _, some in batches]
    hidden = [start.hidden for start in starts]
    layers = range(loaded.layers)
    with block_feed(loaded, layers, prefetch=True) as resident:
        for layer in layers:
            with resident(layer):
                for place, (numbers, _) in enumerate(batches):
                    at[:] = numbers
                    hidden[place] = starts[place].calls[layer].run(loaded.block(layer), hidden[place])
                at.clear()


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield the numbers of rows of equal length, as many together as a batch takes."""
    for length in sorted({len(row) for row in rows}):
        equal = [number for number, row in enumerate(rows) if len(row) == length]
        step = max(1, BATCH_TOKENS // length)
        yield from (equal[start : start + step] for start in range(0, len(equal), step))
