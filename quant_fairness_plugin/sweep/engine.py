"""A whole sweep: which plans, their scores through the state tree, and what the scores say.

The model is never changed; weights are exchanged by reference and always put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Granularity,
    Grid,
    LanguageDamage,
    Mode,
    Precision,
    Ranking,
    SearchRecord,
    StateScores,
    Status,
    SweepReport,
    SweepRow,
    TextSet,
    Undefined,
    Unit,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure.damage import measure_damage, objective_values, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.model.block_feed import block_in_memory
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.plans.plan_set import BASELINE, Plan, PlanSet, Score, around_plans, check_precisions
from quant_fairness_plugin.plans.search import search_sets
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.quantize.grid_rules import check_grid
from quant_fairness_plugin.statistics.ranking import rank_units
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from quant_fairness_plugin.sweep.bank import Bank, RtnBank, check_bank_fits, fitting_units
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.jobs import BankRecipe
from quant_fairness_plugin.sweep.streaming import score_plans_layerwise
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import Progress, score_plans

Scorer = Callable[..., dict[str, StateScores]]
"""`score_plans` and its like, with the model, its units and its bank filled in."""


def sweep_units(
    loaded: LoadedModel,
    texts: TextSet,
    config: SweepConfig = SweepConfig(),
    *,
    grid: Grid | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    bank_recipe: BankRecipe | None = None,
    execution: Execution = Execution(),
    progress: Progress | None = None,
) -> SweepReport:
    """Return the damage of every plan, language by language, and the units ranked by each objective.

    The model is left bit-identical. Languages that the 16-bit model does not support are named in the report and not
    swept: they have nothing to lose. Plans are evaluated with round-to-nearest weights: they rank units, they do not
    predict the damage of a GPTQ checkpoint.

    Args:
        loaded: the 16-bit model.
        texts: the sentences to choose on (the `search` part).
        config: which plans.
        grid: integer grid of the quantized units; INT4, groups of 128, symmetric by default.
        bootstrap: reference language and resamples of all intervals.
        bank_recipe: makes the bank of quantized weights on that grid, from a checkpoint; None rounds to nearest.
        execution: from where the sweep resumes, where it runs, and in how much memory.
        progress: called with (block passes done, in all), from the start again where a second walk is needed.

    Raises:
        ConfigError: the grid is not a grid, or fits no weight of the model; sets that are not smaller than the model,
            or precisions that single nothing out; an execution that does not go with the model or the bank.
        ResourceError: the memory budget is too small.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    subject = _prepare(loaded, config, grid or Grid(), bank_recipe, execution)
    here, score = _scorers(subject, execution)
    statuses = support_of(loaded, texts, here)
    supported = tuple(name for name, status in statuses.items() if status == "supported")
    # An unsupported reference stays in, so that excess and disparity say why they are undefined.
    texts = texts.choose([name for name in statuses if name in supported or name == bootstrap.reference])
    results = _evaluate(subject, config, partial(score, texts=texts, progress=progress), supported)
    judge = _Judge(
        results.scores, texts, loaded.model.config.get_text_config().vocab_size, bootstrap, subject.planned.quantized
    )
    return _report(subject, config, judge, results, statuses)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is swept: a model on a grid, and the plans for it."""

    loaded: LoadedModel
    grid: Grid
    units: UnitMap
    bank: Bank
    planned: PlanSet
    around: Sequence[Plan]
    """Plans that also quantize what stands around the layers."""


def _prepare(
    loaded: LoadedModel, config: SweepConfig, grid: Grid, recipe: BankRecipe | None, execution: Execution
) -> _Subject:
    """Return the plans for a model, after all checks that need no text."""
    check_grid(grid)
    quantized = grid.precision
    check_precisions(config.precisions, config.modes, quantized)
    execution.check(loaded, recipe)
    units = map_units(loaded)
    in_memory = execution.memory_budget is None
    bank = RtnBank(loaded, units, grid, keep=in_memory) if recipe is None else recipe(loaded, units)
    with block_in_memory(loaded, 0):
        everything = swept_units(units, bank, config.granularity, quantized)
    planned = config.plan_set(everything, quantized)
    return _Subject(loaded, grid, units, bank, planned, around_plans(config.also, units, everything, config.modes))


def swept_units(units: UnitMap, bank: Bank, granularity: Granularity, precision: Precision) -> tuple[str, ...]:
    """Return the units to single out: every layer, or every fusion group that the bank quantizes, in forward order.

    Raises:
        ConfigError: the bank quantizes nothing, or cannot exchange fusion groups one by one.
    """
    check_bank_fits(bank, units, precision)
    if granularity == "layer":
        return tuple(str(Unit(layer)) for layer in range(units.layers))
    return fitting_units(bank, units, precision)


def _scorers(subject: _Subject, execution: Execution) -> tuple[Scorer, Scorer]:
    """Return what scores in this process, and what scores where the execution says."""
    given: dict[str, Any] = {"units": subject.units, "bank": subject.bank}
    if execution.memory_budget is not None:
        layerwise = partial(score_plans_layerwise, subject.loaded, **given, execution=execution)
        return layerwise, layerwise
    if execution.by_trials:
        # The 16-bit model alone is run in this process: to start workers for it would take longer.
        here, there = (
            partial(score_plans_resumably, subject.loaded, **given, execution=each)
            for each in (replace(execution, executor=None), execution)
        )
        return here, there
    whole = partial(score_plans, subject.loaded, **given)
    return whole, whole


def support_of(loaded: LoadedModel, texts: TextSet, score: Scorer) -> dict[str, Status]:
    """Return which languages the 16-bit model knows at all.

    Raises:
        QualityGateError: none of them.
    """
    baseline = score({}, texts)[BASELINE]
    vocabulary = loaded.model.config.get_text_config().vocab_size
    few = Bootstrap(reference=None, draws=MINIMUM_DRAWS)
    rows = measure_damage(baseline, baseline, texts, vocabulary=vocabulary, bootstrap=few)
    if not supported_languages(rows):
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(texts.languages)} ({rows[0].reason}); sweep a trained model"
        )
    return {row.language: row.status for row in rows}


@dataclass(frozen=True, slots=True)
class _Results:
    """What was evaluated."""

    plans: Sequence[Plan]
    """Without those that quantize what stands around the layers."""
    scores: dict[str, StateScores]
    search: SearchRecord | None


def _evaluate(subject: _Subject, config: SweepConfig, score: Score, languages: Sequence[str]) -> _Results:
    """Score all plans: the planned ones, those of the search, and in a walk of their own those around the layers."""
    planned, record = subject.planned, None
    plans, scores = planned.evaluate(score)
    if config.search is not None:
        result = search_sets(
            config.search,
            planned.units,
            {plan.units: scores[plan.name] for plan in plans if plan.keeps_16_bit},
            lambda more: score(planned.precisions_of(more)),
            languages=languages,
            most=config.max_plans,
        )
        plans, scores, record = [*plans, *result.plans], scores | result.scores, result.record
    if subject.around:
        around = score(planned.precisions_of(subject.around))
        scores |= {plan.name: around[plan.name] for plan in subject.around}
    return _Results(plans, scores, record)


@dataclass(frozen=True, slots=True)
class _Judge:
    """What scores say, all on the same resamples. The one place that hands the bootstrap to the statistics."""

    scores: Mapping[str, StateScores]
    texts: TextSet
    vocabulary: int
    bootstrap: Bootstrap
    quantized: Precision

    def row(self, plan: Plan) -> SweepRow:
        """Return a plan's damage and objectives."""
        baseline, state = self.scores[BASELINE], self.scores[plan.name]
        damage = measure_damage(baseline, state, self.texts, vocabulary=self.vocabulary, bootstrap=self.bootstrap)
        return SweepRow(
            plan=plan.name,
            mode=plan.mode,
            units=plan.units,
            precision=None if plan.mode is None else plan.precision if plan.mode == "protect-one" else self.quantized,
            damage=damage,
            objectives=objective_values(baseline, state, damage, bootstrap=self.bootstrap),
        )

    def rankings(
        self, rows: Sequence[SweepRow], units: Sequence[str], modes: Sequence[Mode], top: int
    ) -> dict[str, Ranking | Undefined]:
        """Return the units ranked by every mode and objective."""
        damage: dict[str, tuple[LanguageDamage, ...]] = {row.plan: row.damage for row in rows}
        return {
            f"{mode} {objective}": rank_units(
                self.scores,
                damage,
                units=units,
                mode=mode,
                objective=objective,
                top=top,
                bootstrap=self.bootstrap,
            )
            for mode in modes
            for objective in OBJECTIVES
        }

    def sets(self, rows: Sequence[SweepRow], languages: tuple[str, ...]) -> EvaluatedSets:
        """Return the sets of units that were evaluated, for tests of what they do together."""
        return EvaluatedSets(rows=rows, scores=self.scores, languages=languages, bootstrap=self.bootstrap)


def _report(
    subject: _Subject, config: SweepConfig, judge: _Judge, results: _Results, statuses: dict[str, Status]
) -> SweepReport:
    loaded, planned, record, bootstrap = subject.loaded, subject.planned, results.search, judge.bootstrap
    rows = tuple(map(judge.row, results.plans))
    sets = judge.sets(rows, tuple(name for name, status in statuses.items() if status == "supported"))
    layer_bytes, other_bytes = count_bytes(loaded, subject.grid, config.precisions)
    arguments = _arguments(subject, config, bootstrap)
    return SweepReport(
        provenance=provenance(loaded, judge.texts, seed=bootstrap.seed, arguments=arguments),
        layers=loaded.layers,
        granularity=config.granularity,
        precisions=config.precisions,
        combine=config.combine,
        combinations=planned.combinations,
        grid=subject.grid,
        reference=bootstrap.reference,
        languages=statuses,
        rows=rows,
        around=tuple(map(judge.row, subject.around)),
        rankings=judge.rankings(rows, planned.units, config.modes, config.top),
        search=record,
        interactions=sets.interactions(config.modes),
        necessity=sets.necessity_tests(sorted({*planned.counts, *([] if record is None else [record.size])})),
        scores=results.scores,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
    )


def _arguments(subject: _Subject, config: SweepConfig, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the arguments as resolved, plain JSON data."""
    plans = config.arguments
    top = plans.pop("top")
    return {
        "grid": str(subject.grid), "dtype": str(subject.loaded.model.dtype).removeprefix("torch."),
        "bank": subject.bank.description, **plans,
        "reference": bootstrap.reference, "top": top, "draws": bootstrap.draws,
    }  # fmt: skip
