"""A whole sweep: which plans, their scores through the state tree, and what the scores say. Step 4 (sweep).

The model is never changed; weights are exchanged by reference and always put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Granularity,
    Grid,
    LanguageDamage,
    Mode,
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
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.measure.damage import measure_damage, objective_values, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.plans.plan_set import (
    BASELINE,
    MOST_COMBINATIONS,
    AroundPlan,
    PlanSet,
    Score,
    SweptPlan,
    around_plans,
    check_plans,
    check_precisions,
)
from quant_fairness_plugin.plans.search import Search, search_sets
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.quantize.grid_rules import check_grid
from quant_fairness_plugin.statistics.ranking import rank_units
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from quant_fairness_plugin.sweep.bank import Bank, RtnBank, check_bank_fits, fitting_units
from quant_fairness_plugin.sweep.executors import Executor
from quant_fairness_plugin.sweep.jobs import BankRecipe
from quant_fairness_plugin.sweep.streaming import block_in_memory, check_residence, score_plans_layerwise
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import score_plans

Progress = Callable[[int, int], None]


def sweep_units(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    grid: Grid | None = None,
    bank_recipe: BankRecipe | None = None,
    modes: Sequence[Mode] = ("protect-one",),
    granularity: Granularity = "layer",
    precisions: Sequence[Precision] = ("fp16",),
    combine: int = 1,
    search: Search | None = None,
    max_plans: int = MOST_COMBINATIONS,
    also: Sequence[str] = (),
    reference: str | None = "en",
    top: int = 3,
    draws: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
    work: Path | None = None,
    executor: Executor | None = None,
    memory_budget: int | None = None,
) -> SweepReport:
    """Damage of every plan, language by language, and the units ranked by each objective.

    The model is left bit-identical. Languages that the 16-bit model does not support are named in the report and not
    swept: they have nothing to lose. Plans are evaluated with round-to-nearest weights: they rank units, they do not
    predict the damage of a GPTQ checkpoint.

    Args:
        loaded: the 16-bit model.
        texts: the sentences to choose on (the `search` part).
        grid: integer grid of the quantized units; INT4, groups of 128, symmetric by default.
        bank_recipe: makes the bank of quantized weights on that grid, from a checkpoint; None rounds to nearest.
        modes: `protect-one` (all others quantized) and/or `quantize-one` (all others 16 bit).
        granularity: whether whole layers or their fusion groups are singled out. Groups that the grid does not fit are
            in 16 bit in every plan.
        precisions: what each unit is singled out at under `protect-one`: `fp16` always, others for a plan of several
            precisions.
        combine: 2 for all pairs besides the single units, 3 for all triples too.
        search: how to look for sets of units to protect besides.
        max_plans: most sets of one size. Where there are more, those of the units that count most by themselves.
        also: what else to quantize in further plans that are simulation only (see `sweep.around`): `embeddings`,
            `positions`, `biases`, `norms`, `final_norm`, `head`.
        reference: language of excess and disparity, or None.
        top: how many units the stability figures are about.
        draws: bootstrap resamples of the sentences.
        seed: seed of the resamples.
        progress: called with (block passes done, in all), from the start again where a second walk is needed.
        work: a folder that keeps every finished trial, so that a sweep that was interrupted goes on from there.
        executor: where the trials run; None is this process. With `work` or `executor` a trial has one thread.
        memory_budget: bytes; the sweep then goes layer by layer, which a model from `open_streamed` needs. `work` keeps
            what is between two layers.

    Raises:
        ConfigError: the grid is not a grid, or fits no weight of the model; `combine` or the search's size is not fewer
            than the units, or precisions that single nothing out; a memory budget together with an executor
            or a bank.
        ResourceError: the memory budget is too small.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    grid = grid or Grid()
    check_grid(grid)
    quantized = precision_of_bits(grid.bits)
    check_precisions(precisions, modes, quantized)
    units = map_units(loaded)
    check_residence(loaded, memory_budget, executor)
    bank = _make_bank(loaded, units, grid, bank_recipe, memory_budget)
    with block_in_memory(loaded, 0):
        everything = swept_units(units, bank, granularity, quantized)
    check_plans(modes, everything, combine, max_plans)
    further = around_plans(also, units, everything, modes, quantized)
    if search is not None:
        search.check(len(everything))
    score = here = partial(score_plans, loaded, units=units, bank=bank)
    if memory_budget is not None:
        budgeted = partial(score_plans_layerwise, loaded, units=units, bank=bank)
        score = here = partial(budgeted, memory_budget=memory_budget, work=work)
    elif work is not None or executor is not None:
        # The 16-bit model alone is run in this process: to start workers for it would take longer.
        here = partial(score_plans_resumably, loaded, units=units, bank=bank, work=work)
        score = partial(here, executor=executor)
    statuses = _support(loaded, texts, here)
    # An unsupported reference stays in, so that excess and disparity say why they are undefined.
    texts = texts.choose([name for name, status in statuses.items() if status == "supported" or name == reference])
    planned = PlanSet(everything, tuple(modes), combine, max_plans, quantized, tuple(precisions))
    walk = partial(score, texts=texts, progress=progress)
    plans, scores = planned.evaluate(walk)
    supported = tuple(name for name, status in statuses.items() if status == "supported")
    record = None
    if search is not None:
        known = {plan.units: scores[plan.name] for plan in plans if plan.keeps_16_bit}
        found = search_sets(
            search, everything, known, lambda more: walk(planned.spelled_out(more)), languages=supported, most=max_plans
        )
        plans, scores, record = [*plans, *found.plans], scores | found.scores, found.record
    scores |= _score_around(further, walk)
    bootstrap = Bootstrap(reference, draws, seed)
    judge = _Judge(scores, texts, loaded.model.config.vocab_size, bootstrap, quantized)
    rows = tuple(map(judge.row, plans))
    sets = EvaluatedSets(rows=rows, scores=scores, languages=supported, bootstrap=bootstrap)
    layer_bytes, other_bytes = count_bytes(loaded, grid, precisions)
    arguments = {
        "grid": str(grid), "dtype": str(loaded.model.dtype).removeprefix("torch."), "bank": bank.description,
        "modes": list(modes), "granularity": granularity,
        "precisions": list(precisions), "combine": combine, "search": None if search is None else asdict(search),
        "max_plans": max_plans, "also": list(also), "reference": reference, "top": top, "draws": draws,
    }  # fmt: skip
    return SweepReport(
        provenance=provenance(loaded.files, texts, seed=seed, arguments=arguments),
        layers=loaded.layers,
        granularity=granularity,
        precisions=tuple(precisions),
        combine=combine,
        combinations=planned.combinations,
        grid=grid,
        reference=reference,
        languages=statuses,
        rows=rows,
        around=tuple(map(judge.row, further)),
        rankings=judge.rankings(rows, everything, modes, top),
        search=record,
        interactions=sets.interactions(modes),
        necessity=sets.necessity_tests(sorted({*planned.counts, *([] if record is None else [record.size])})),
        scores=scores,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
    )


def _make_bank(
    loaded: LoadedModel, units: UnitMap, grid: Grid, recipe: BankRecipe | None, memory_budget: int | None
) -> Bank:
    if recipe is None:
        return RtnBank(loaded, units, grid, keep=memory_budget is None)
    if memory_budget is not None:
        raise ConfigError("a bank from a checkpoint and a memory budget do not go together; leave one of them out")
    return recipe(loaded, units)


def _score_around(plans: Sequence[AroundPlan], walk: Score) -> dict[str, StateScores]:
    """The scores of plans that are simulation only, in a walk of their own; nothing where there are none."""
    scores = walk({plan.name: plan.quantized for plan in plans}) if plans else {}
    return {plan.name: scores[plan.name] for plan in plans}


def swept_units(units: UnitMap, bank: Bank, granularity: Granularity, precision: Precision) -> tuple[str, ...]:
    """The units to single out: every layer, or every fusion group that the bank quantizes, in forward order.

    Raises:
        ConfigError: the bank quantizes nothing, or cannot exchange fusion groups one by one.
    """
    check_bank_fits(bank, units, precision)
    if granularity == "layer":
        return tuple(f"layers.{layer}" for layer in range(units.layers))
    return fitting_units(bank, units, precision)


@dataclass(frozen=True, slots=True)
class _Judge:
    """What scores say, all on the same resamples."""

    scores: Mapping[str, StateScores]
    texts: TextSet
    vocabulary: int
    bootstrap: Bootstrap
    quantized: Precision

    def row(self, plan: SweptPlan | AroundPlan) -> SweepRow:
        """A plan's damage and objectives."""
        baseline, state = self.scores[BASELINE], self.scores[plan.name]
        damage = measure_damage(baseline, state, self.texts, vocabulary=self.vocabulary, bootstrap=self.bootstrap)
        objectives = objective_values(baseline, state, damage, bootstrap=self.bootstrap)
        return SweepRow(
            plan=plan.name,
            mode=plan.mode,
            units=plan.units,
            precision=None if plan.mode is None else plan.precision if plan.mode == "protect-one" else self.quantized,
            damage=damage,
            objectives=objectives,
        )

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
                top=top,
                bootstrap=self.bootstrap,
            )
            for mode in modes
            for objective in OBJECTIVES
        }


def _support(loaded: LoadedModel, texts: TextSet, score: Callable[..., dict[str, StateScores]]) -> dict[str, Status]:
    """Which languages the 16-bit model knows at all.

    Raises:
        QualityGateError: none of them.
    """
    baseline = score({}, texts)[BASELINE]
    vocabulary = loaded.model.config.vocab_size
    few = Bootstrap(reference=None, draws=MINIMUM_DRAWS)
    rows = measure_damage(baseline, baseline, texts, vocabulary=vocabulary, bootstrap=few)
    if not supported_languages(rows):
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(texts.languages)} ({rows[0].reason}); sweep a trained model"
        )
    return {row.language: row.status for row in rows}
