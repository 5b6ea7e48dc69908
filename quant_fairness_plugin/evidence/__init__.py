"""A plan and plans that needed no search, at equal bytes, evaluated on sentences that neither was selected on.

Takes the model and a `ProtectionPlan`; returns `Evidence`: every plan's worst and mean damage, where the plan stands
among random ones, which controls it beats, and what of all this is worth its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Comparison,
    Evidence,
    EvidenceRow,
    Precision,
    ProtectionPlan,
    Standing,
    StateScores,
    TextSet,
    Undefined,
    Unit,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.evidence.layer_scores import score_layers
from quant_fairness_plugin.measure.damage import measure_damage, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.controls import RANDOM_PLANS, Control, controls_for
from quant_fairness_plugin.plans.costs import Costs, count_bytes, layer_costs, plan_bytes
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.statistics.pareto import pareto_frontier
from quant_fairness_plugin.statistics.series import Series, number_of, plan_series
from quant_fairness_plugin.statistics.standing import compare_with, standing_of, verdict
from quant_fairness_plugin.sweep.bank import Bank, RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import score_plans

THE_PLAN = "the plan"
RANDOM = "random "
HERE = Execution()
"""All at once in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rivals:
    """What a plan is compared with, beside nothing at all and more bits for everything."""

    texts: TextSet
    """Sentences for controls that need some to select layers by (the `search` part, as the plan had)."""
    plans: Mapping[str, ProtectionPlan] = field(default_factory=dict)
    """Other plans on the same grid, by name."""
    random_plans: int = RANDOM_PLANS


def gather_evidence(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    texts: TextSet,
    *,
    rivals: Rivals,
    objective: str = "worst",
    bootstrap: Bootstrap,
    progress: Callable[[int, int], None] | None = None,
    execution: Execution = HERE,
) -> Evidence:
    """Evaluate a plan, protecting nothing, and every control of equal bytes, all on the same sentences.

    Args:
        loaded: the 16-bit model; bit-identical afterwards.
        plan: what to judge; it must protect something.
        texts: sentences that the plan was not selected on (the `confirm` part).
        rivals: what to compare with.
        objective: what plans are compared by; its name in `measure.objectives`.
        bootstrap: resamples of the sentences, the reference of objectives that need one, and the seed of random sets.
        progress: called with (block passes done, in all).
        execution: where finished trials are stored, and what runs them.

    Raises:
        ConfigError: the plan protects nothing to compare, an unknown objective, or a memory budget.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    find_objective(objective)
    units = map_units(loaded)
    bank = RtnBank(loaded, units, plan.grid)
    contest = _contest(loaded, plan, rivals, bank, bootstrap.seed)
    scores = _scorer(execution)(loaded, contest.whole_plans, texts, units=units, bank=bank, progress=progress)
    languages, collapsed = _statuses(loaded, scores, texts)
    series = {
        name: plan_series(scores, contest.bytes_, languages, objective=name, bootstrap=bootstrap, collapsed=collapsed)
        for name in dict.fromkeys(("worst", "mean", objective))
    }
    standing, comparisons = _compare(series[objective], contest.controls)
    arguments = {
        "objective": objective, "draws": bootstrap.draws, "bank": bank.description,
        "random_plans": rivals.random_plans,
    }  # fmt: skip
    return Evidence(
        provenance=provenance(loaded, texts, seed=bootstrap.seed, arguments=arguments),
        plan=plan,
        objective=objective,
        grid=plan.grid,
        bank=bank.description,
        languages=languages,
        rows=contest.rows(series["worst"], series["mean"]),
        standing=standing,
        comparisons=comparisons,
        frontier=pareto_frontier(contest.bytes_, series["worst"], series["mean"]),
        verdict=verdict(THE_PLAN, standing, comparisons),
    )


@dataclass(frozen=True, slots=True)
class _Contest:
    """The plan, protecting nothing, and the controls: everything that is evaluated."""

    plan: Control
    """The plan itself, in the form of a control."""
    controls: Sequence[Control]
    costs: Costs

    @property
    def bytes_(self) -> dict[str, int]:
        """Name → bytes of the checkpoint."""
        return {control.name: control.bytes_ for control in self._all}

    @property
    def whole_plans(self) -> dict[str, dict[str, Precision]]:
        """Name → precision of every layer, and of the fusion groups that differ from their layer."""
        grid = dict.fromkeys(self.costs.units, self.costs.quantized)
        return {control.name: grid | control.precisions for control in self._all}

    def rows(self, worst: Mapping[str, Series], mean: Mapping[str, Series]) -> tuple[EvidenceRow, ...]:
        """Return a row per plan, from its damage resample by resample."""
        return tuple(
            EvidenceRow(
                name=control.name,
                precisions=control.precisions,
                bytes_=control.bytes_,
                matched=control.matched,
                worst=number_of(worst[control.name]),
                mean=number_of(mean[control.name]),
                why=control.why,
            )
            for control in self._all
        )

    @property
    def _all(self) -> tuple[Control, ...]:
        floor = self.costs.total({})
        nothing = Control(
            name=NONE,
            precisions={},
            bytes_=floor,
            difference=floor - self.plan.bytes_,
            matched=False,
            why="nothing protected",
        )
        return nothing, self.plan, *self.controls


def _contest(loaded: LoadedModel, plan: ProtectionPlan, rivals: Rivals, bank: Bank, seed: int) -> _Contest:
    """The plan and its controls, rivals first."""
    costs, target = layer_costs(loaded, plan.grid), _bytes(loaded, plan)
    itself = _as_control(THE_PLAN, plan, target, target, costs)
    controls = [_as_control(name, rival, _bytes(loaded, rival), target, costs) for name, rival in rivals.plans.items()]
    scores = score_layers(loaded, rivals.texts, units=map_units(loaded), bank=bank, quantized=plan.quantized_precision)
    controls += controls_for(
        itself.precisions, costs, plan_bytes=target, scores=scores, random_plans=rivals.random_plans, seed=seed
    )
    return _Contest(itself, controls, costs)


def _as_control(name: str, plan: ProtectionPlan, bytes_: int, target: int, costs: Costs) -> Control:
    precisions: dict[str, Precision] = {str(Unit(layer)): "fp16" for layer in plan.protected_layers}
    precisions |= plan.overrides
    if not precisions:
        raise ConfigError("the plan protects nothing, so there is nothing to compare; use --top or a larger budget")
    return Control(
        name=name,
        precisions=precisions,
        bytes_=bytes_,
        difference=bytes_ - target,
        matched=abs(bytes_ - target) <= costs.tolerance,
        why=plan.source,
    )


def _scorer(execution: Execution) -> Callable[..., dict[str, StateScores]]:
    if execution.memory_budget is not None:
        raise ConfigError(
            f"memory budget of {execution.memory_budget} bytes: only a sweep goes layer by layer, plans are compared "
            "with the whole model in memory; leave it out"
        )
    return partial(score_plans_resumably, execution=execution) if execution.by_trials else score_plans


def _bytes(loaded: LoadedModel, plan: ProtectionPlan) -> int:
    kinds = tuple(kind for kind in plan.overrides.values() if kind != plan.quantized_precision)
    sizes, other = count_bytes(loaded, plan.grid, kinds)
    return plan_bytes(sizes, other, plan.protected_layers, plan.overrides, quantized=plan.quantized_precision)


def _compare(
    series: Mapping[str, Series], controls: Sequence[Control]
) -> tuple[Standing | Undefined, tuple[Comparison, ...]]:
    plan = series[THE_PLAN]
    if isinstance(plan, Undefined):
        return plan, ()
    random = {row.name: series[row.name] for row in controls if row.matched and row.name.startswith(RANDOM)}
    affordable = [row.name for row in controls if row.matched or row.difference < 0]
    others = {name: series[name] for name in (NONE, *affordable) if not name.startswith(RANDOM)}
    return standing_of(plan, random), compare_with(plan, others)


def _statuses(
    loaded: LoadedModel, scores: Mapping[str, StateScores], texts: TextSet
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Languages that the 16-bit model supports, and those of them that collapsed under a plan."""
    measure = partial(
        measure_damage,
        scores[BASELINE],
        texts=texts,
        vocabulary=loaded.model.config.get_text_config().vocab_size,
        bootstrap=Bootstrap(reference=None, draws=MINIMUM_DRAWS),
    )
    languages = supported_languages(measure(scores[BASELINE]))
    if not languages:
        raise QualityGateError(f"the 16-bit model supports none of {', '.join(texts.languages)}; judge a trained model")
    collapsed = {
        name: tuple(row.language for row in measure(state) if row.status == "collapsed")
        for name, state in scores.items()
        if name != BASELINE
    }
    return languages, {name: lost for name, lost in collapsed.items() if lost}
