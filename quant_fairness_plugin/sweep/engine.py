"""A whole sweep: which plans, their scores through the state tree, and what the scores say. Step 4 (sweep).

The model is never changed; weights are exchanged by reference and always put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from quant_fairness_plugin.artifacts import (
    Granularity,
    Grid,
    LanguageDamage,
    Mode,
    Objective,
    Precision,
    Ranking,
    StateScores,
    Status,
    SweepReport,
    SweepRow,
    TextSet,
    Undefined,
    precision_of_bits,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure.damage import measure_damage, objective_values, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.quantize.grid_rules import check_grid
from quant_fairness_plugin.sweep.bank import Bank, RtnBank, check_bank_fits
from quant_fairness_plugin.sweep.executors import Executor
from quant_fairness_plugin.sweep.plans import MOST_COMBINATIONS, PlanSet, SweptPlan, check_plans
from quant_fairness_plugin.sweep.ranking import BASELINE, rank_units
from quant_fairness_plugin.sweep.score import score_plans
from quant_fairness_plugin.sweep.sizes import Shape, dense_bytes, quantized_bytes
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.units import UnitMap, map_units

Progress = Callable[[int, int], None]


def sweep_units(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    grid: Grid | None = None,
    modes: Sequence[Mode] = ("protect-one",),
    granularity: Granularity = "layer",
    combine: int = 1,
    max_plans: int = MOST_COMBINATIONS,
    reference: str | None = "en",
    top: int = 3,
    draws: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    work: Path | None = None,
    executor: Executor | None = None,
) -> SweepReport:
    """Damage of every plan, language by language, and the units ranked by each objective.

    The model is left bit-identical. Languages that the 16-bit model does not support are named in the report and not
    swept: they have nothing to lose. Plans are evaluated with round-to-nearest weights: they rank units, they do not
    predict the damage of a GPTQ checkpoint.

    Args:
        loaded: the 16-bit model.
        texts: the sentences to choose on (the `search` part).
        grid: integer grid of the quantized units; INT4, groups of 128, symmetric by default.
        modes: `protect-one` (all others quantized) and/or `quantize-one` (all others 16 bit).
        granularity: whether whole layers or their fusion groups are singled out. Groups that the grid does not fit are
            in 16 bit in every plan.
        combine: 2 for all pairs besides the single units, 3 for all triples too.
        max_plans: most sets of one size. Where there are more, those of the units that count most by themselves.
        reference: language of excess and disparity, or None.
        top: how many units the stability figures are about.
        draws: bootstrap resamples of the sentences.
        seed: seed of the resamples.
        progress: called with (block passes done, in all), from the start again where a second walk is needed.
        work: a folder that keeps every finished trial, so that a sweep that was interrupted goes on from there.
        executor: where the trials run; None is this process. With `work` or `executor` a trial has one thread.

    Raises:
        ConfigError: the grid is not a grid, or fits no weight of the model; or `combine` is not fewer than the units.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    grid = grid or Grid()
    check_grid(grid)
    units = map_units(loaded)
    bank = RtnBank(loaded, units, grid)
    everything = swept_units(units, bank, granularity, precision_of_bits(grid.bits))
    check_plans(modes, everything, combine, max_plans)
    score = partial(score_plans, loaded, units=units, bank=bank)
    if work is not None or executor is not None:
        score = partial(score_plans_resumably, loaded, units=units, bank=bank, work=work, executor=executor)
    statuses = _support(loaded, texts, score)
    # An unsupported reference stays in, so that excess and disparity say why they are undefined.
    texts = texts.choose([name for name, status in statuses.items() if status == "supported" or name == reference])
    planned = PlanSet(everything, tuple(modes), combine, max_plans, precision_of_bits(grid.bits))
    plans, scores = planned.evaluate(lambda wanted: score(wanted, texts, progress=progress))
    judge = _Judge(scores, texts, loaded.model.config.vocab_size, reference, draws, seed)
    rows = tuple(map(judge.row, plans))
    layer_bytes, other_bytes = count_bytes(loaded, grid)
    arguments = {
        "grid": str(grid), "bank": bank.description, "modes": list(modes), "granularity": granularity,
        "combine": combine, "max_plans": max_plans, "reference": reference, "top": top, "draws": draws,
    }  # fmt: skip
    return SweepReport(
        provenance=provenance(loaded.files, texts, seed=seed, arguments=arguments),
        layers=loaded.layers,
        granularity=granularity,
        combine=combine,
        combinations=planned.combinations,
        grid=grid,
        reference=reference,
        languages=statuses,
        rows=rows,
        rankings=judge.rankings(rows, everything, modes, top),
        scores=scores,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
    )


def swept_units(units: UnitMap, bank: Bank, granularity: Granularity, precision: Precision) -> tuple[str, ...]:
    """The units to single out: every layer, or every fusion group that the bank quantizes, in forward order.

    Raises:
        ConfigError: the bank quantizes nothing.
    """
    check_bank_fits(bank, units, precision)
    if granularity == "layer":
        return tuple(f"layers.{layer}" for layer in range(units.layers))
    # All blocks are equal, so that what fits in the first one fits in all.
    fitting = [group for group in units.groups if bank.weights(f"layers.0.{group}", precision)]
    return tuple(f"layers.{layer}.{group}" for layer in range(units.layers) for group in fitting)


@dataclass(frozen=True, slots=True)
class _Judge:
    """What scores say, all on the same resamples."""

    scores: Mapping[str, StateScores]
    texts: TextSet
    vocabulary: int
    reference: str | None
    draws: int
    seed: int

    def row(self, plan: SweptPlan) -> SweepRow:
        """A plan's damage and objectives."""
        baseline, state = self.scores[BASELINE], self.scores[plan.name]
        damage = measure_damage(
            baseline,
            state,
            self.texts,
            reference=self.reference,
            vocabulary=self.vocabulary,
            draws=self.draws,
            seed=self.seed,
        )
        objectives = objective_values(
            baseline, state, damage, reference=self.reference, draws=self.draws, seed=self.seed
        )
        return SweepRow(plan=plan.name, mode=plan.mode, units=plan.units, damage=damage, objectives=objectives)

    def rankings(
        self, rows: Sequence[SweepRow], units: Sequence[str], modes: Sequence[Mode], top: int
    ) -> dict[str, Ranking | Undefined]:
        """The units by every mode and objective."""
        damage: dict[str, tuple[LanguageDamage, ...]] = {row.plan: row.damage for row in rows}
        return {
            f"{mode} {objective}": rank_units(
                self.scores,
                damage,
                units=units,
                mode=mode,
                objective=objective,
                reference=self.reference,
                top=top,
                draws=self.draws,
                seed=self.seed,
            )
            for mode in modes
            for objective in get_args(Objective)
        }


def _support(loaded: LoadedModel, texts: TextSet, score: Callable[..., dict[str, StateScores]]) -> dict[str, Status]:
    """Which languages the 16-bit model knows at all.

    Raises:
        QualityGateError: none of them.
    """
    baseline = score({}, texts)[BASELINE]
    vocabulary = loaded.model.config.vocab_size
    rows = measure_damage(baseline, baseline, texts, reference=None, vocabulary=vocabulary, draws=MINIMUM_DRAWS)
    if not supported_languages(rows):
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(texts.languages)} ({rows[0].reason}); sweep a trained model"
        )
    return {row.language: row.status for row in rows}


def count_bytes(loaded: LoadedModel, grid: Grid) -> tuple[dict[str, tuple[int, ...]], int]:
    """Bytes of each layer's linear weights, whole and by unit (see `sizes`), and the bytes of everything else."""
    wide = replace(grid, bits=8)
    costs: dict[str, Callable[[Sequence[Shape]], int]] = {
        "fp16": dense_bytes,
        "quantized": lambda shapes: quantized_bytes(shapes, grid),
        "int8": lambda shapes: quantized_bytes(shapes, wide),
    }
    sizes: dict[str, tuple[int, ...]] = {}
    by_unit = {
        unit.name: [_shapes(loaded, i, unit.modules) for i in range(loaded.layers)] for unit in loaded.family.units
    }
    for kind, cost in costs.items():
        own = {f"{kind}.{name}": tuple(map(cost, layers)) for name, layers in by_unit.items()}
        sizes |= {kind: tuple(map(sum, zip(*own.values(), strict=True)))} | own
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return sizes, 2 * parameters - sum(sizes["fp16"])


def _shapes(loaded: LoadedModel, layer: int, modules: Sequence[str]) -> list[Shape]:
    block = loaded.block(layer)
    weights = [linear_weight(block.get_submodule(name)) for name in modules]
    return [(weight.shape[0], weight.shape[1]) for weight in weights]
