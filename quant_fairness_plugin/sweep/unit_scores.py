"""Scores of every unit from one pass of gradients, as an artifact that plans are made from without the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from quant_fairness_plugin.artifacts import Grid, Precision, TextSet, UnitScores
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.model.streamed import budget_of
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.plans.units import UnitMap
from quant_fairness_plugin.sweep.bank import Bank, check_bank_fits
from quant_fairness_plugin.sweep.engine import support_of
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.fisher import Changes, score_sentences
from quant_fairness_plugin.sweep.memory import count_needs
from quant_fairness_plugin.sweep.sampling import Sampling
from quant_fairness_plugin.sweep.search_time import score_in_time
from quant_fairness_plugin.sweep.streaming import score_plans_layerwise


def score_units(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    grid: Grid,
    menu: Sequence[Precision],
    units: UnitMap,
    bank: Bank,
    sampling: Sampling = Sampling(),
    progress: Callable[[int, int], None] | None = None,
) -> UnitScores:
    """Return what the rounding error of every unit alone does to every language, at each precision.

    Languages that the 16-bit model does not support are named and not scored: they have nothing to lose.

    Args:
        loaded: the model; bit-identical afterwards.
        texts: the sentences to choose on (the `search` part).
        grid: the grid of what is not singled out.
        menu: what a unit can get instead; 16 bit needs no score.
        units: the model's units.
        bank: their weights at the grid's precision and at those of the menu.
        sampling: how many sentences and labels the scores are estimated from, and the time for them.
        progress: called with (steps done, in all).

    Raises:
        ConfigError: the bank quantizes nothing.
        UnsupportedModelError: a unit holds a weight that belongs to no linear module.
        QualityGateError: the 16-bit model supports none of the languages.
        ResourceError: a memory budget that does not hold a block in every precision.
    """
    quantized = grid.precision
    kinds: tuple[Precision, ...] = (quantized, *(kind for kind in menu if kind not in ("fp16", quantized)))
    changes = Changes.of(loaded, units, bank, kinds)
    check_bank_fits(bank, units, quantized)
    scorer = partial(score_plans_layerwise, loaded, units=units, bank=bank, execution=_fitting(loaded, len(kinds)))
    statuses = support_of(loaded, texts, scorer)
    supported = [language for language, status in statuses.items() if status == "supported"]

    scores, bytes_ = score_in_time(
        lambda some, seed: score_sentences(loaded, some, changes, draws=sampling.draws, seed=seed, progress=progress),
        texts.choose(supported), sampling.sentences, seed=sampling.seed, search=sampling.search,
    )  # fmt: skip
    layer_bytes, other_bytes = count_bytes(loaded, grid, kinds)
    arguments = {
        "grid": str(grid), "bank": bank.description, "sentences": len(bytes_[supported[0]]), "draws": sampling.draws,
        "menu": [*menu],
    }  # fmt: skip
    return UnitScores(
        provenance=provenance(loaded, texts, seed=sampling.seed, arguments=arguments),
        layers=loaded.layers, grid=grid, precisions=kinds, errors=bank.description, languages=statuses,
        draws=sampling.draws, bytes_=bytes_, kl_nats=scores, layer_bytes=layer_bytes, other_bytes=other_bytes,
    )  # fmt: skip


def _fitting(loaded: LoadedModel, precisions: int) -> Execution:
    """Return how plans are run within a memory budget. Raises ResourceError where it does not hold a block."""
    execution = Execution(memory_budget=budget_of(loaded))
    if execution.memory_budget is not None:
        shapes = {name: tuple(value.shape) for name, value in loaded.model.named_parameters()}
        needs = count_needs(shapes, blocks=loaded.family.blocks, precisions=precisions)
        needs.left_for_states(execution.memory_budget)
    return execution
