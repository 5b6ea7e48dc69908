"""A plan and plans that needed no search, at equal bytes, evaluated on sentences that nothing was chosen on.

Step 4 (sweep). Takes the model and a `ProtectionPlan`; returns `Evidence`: every plan's worst and mean damage, where
the plan stands among random ones, which controls it beats, and what of all this is worth its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from quant_fairness_plugin.artifacts import (
    Comparison,
    Evidence,
    EvidenceRow,
    Number,
    Precision,
    ProtectionPlan,
    Standing,
    StateScores,
    TextSet,
    Undefined,
)
from quant_fairness_plugin.artifacts import (
    Grid as Grid,
)
from quant_fairness_plugin.artifacts import (
    bits_of_precision as bits_of_precision,
)
from quant_fairness_plugin.artifacts import (
    precision_of_bits as precision_of_bits,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.evidence.layer_scores import (
    LayerStatistics as LayerStatistics,
)
from quant_fairness_plugin.evidence.layer_scores import (
    criticality as criticality,
)
from quant_fairness_plugin.evidence.layer_scores import (
    gradient_scores as gradient_scores,
)
from quant_fairness_plugin.evidence.layer_scores import (
    layer_scores,
)
from quant_fairness_plugin.evidence.layer_scores import (
    layer_statistics as layer_statistics,
)
from quant_fairness_plugin.measure.damage import measure_damage, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS, interval
from quant_fairness_plugin.model.linear import linear_weight as linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.plans.controls import RANDOM_PLANS, Control, controls_for
from quant_fairness_plugin.plans.costs import Costs, count_bytes, layer_costs, plan_bytes
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.plans.units import UnitMap as UnitMap
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.statistics.pareto import pareto_frontier
from quant_fairness_plugin.statistics.series import Series, plan_series
from quant_fairness_plugin.statistics.standing import compare_with, standing_of, verdict
from quant_fairness_plugin.sweep.bank import Bank as Bank
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import Executor
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import score_plans

THE_PLAN = "the plan"
RANDOM = "random "
NO_RIVALS: Mapping[str, ProtectionPlan] = MappingProxyType({})
Goal = Literal["worst", "mean"]


def gather_evidence(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    texts: TextSet,
    *,
    chosen_on: TextSet,
    objective: Goal = "worst",
    rivals: Mapping[str, ProtectionPlan] = NO_RIVALS,
    random_plans: int = RANDOM_PLANS,
    draws: int = 2000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    work: Path | None = None,
    executor: Executor | None = None,
) -> Evidence:
    """Evaluate a plan, protecting nothing, and every control of equal bytes, all on the same sentences.

    Args:
        loaded: the 16-bit model; bit-identical afterwards.
        plan: what to judge; it must protect something.
        texts: sentences that the plan was not chosen on (the `confirm` part).
        chosen_on: other sentences, for controls that need some to choose by (the `search` part, as the plan had).
        objective: what plans are compared by.
        rivals: other plans on the same grid to compare with, by name.
        random_plans: how many random sets.
        draws: bootstrap resamples of the sentences.
        seed: of the resamples and the random sets.
        progress: called with (block passes done, in all).
        work: a folder that keeps every finished trial.
        executor: where the trials run; None is this process.

    Raises:
        ConfigError: the plan protects nothing, so that there is nothing to compare.
        QualityGateError: the 16-bit model supports none of the languages.
    """
    chosen = _beyond_the_grid(plan)
    units = map_units(loaded)
    bank = RtnBank(loaded, units, plan.grid)
    costs = layer_costs(loaded, plan.grid)
    scores = layer_scores(loaded, chosen_on, units=units, bank=bank, quantized=plan.quantized_precision)
    target = _bytes(loaded, plan)
    controls = [_rival(name, rival, _bytes(loaded, rival), target, costs) for name, rival in rivals.items()]
    controls += controls_for(chosen, costs, plan_bytes=target, scores=scores, random_plans=random_plans, seed=seed)
    wanted = {NONE: {}, THE_PLAN: chosen} | {control.name: control.precisions for control in controls}
    score = partial(score_plans, loaded, units=units, bank=bank)
    if work is not None or executor is not None:
        score = partial(
            score_plans_resumably, loaded, units=units, bank=bank, execution=Execution(work=work, executor=executor)
        )
    found = score(_whole(wanted, costs), texts, progress=progress)
    return _judge(loaded, plan, controls, found, texts, costs, bank.description, objective, random_plans, draws, seed)


def _rival(name: str, plan: ProtectionPlan, bytes_: int, target: int, costs: Costs) -> Control:
    return Control(
        name=name,
        precisions=_beyond_the_grid(plan),
        bytes_=bytes_,
        difference=bytes_ - target,
        matched=abs(bytes_ - target) <= costs.tolerance,
        why=plan.source,
    )


def _beyond_the_grid(plan: ProtectionPlan) -> dict[str, Precision]:
    chosen: dict[str, Precision] = {f"layers.{layer}": "fp16" for layer in plan.protected_layers}
    chosen |= plan.overrides
    if not chosen:
        raise ConfigError("the plan protects nothing, so there is nothing to compare; use --top or a larger budget")
    return chosen


def _bytes(loaded: LoadedModel, plan: ProtectionPlan) -> int:
    kinds = tuple(kind for kind in plan.overrides.values() if kind != plan.quantized_precision)
    sizes, other = count_bytes(loaded, plan.grid, kinds)
    return plan_bytes(sizes, other, plan.protected_layers, plan.overrides, quantized=plan.quantized_precision)


def _whole(wanted: Mapping[str, Mapping[str, Precision]], costs: Costs) -> dict[str, dict[str, Precision]]:
    """Plans with the grid's precision spelled out for everything that they do not name."""
    return {name: dict.fromkeys(costs.units, costs.quantized) | dict(own) for name, own in wanted.items()}


def _judge(
    loaded: LoadedModel,
    plan: ProtectionPlan,
    controls: Sequence[Control],
    scores: Mapping[str, StateScores],
    texts: TextSet,
    costs: Costs,
    bank: str,
    objective: Goal,
    random_plans: int,
    draws: int,
    seed: int,
) -> Evidence:
    languages, collapsed = _statuses(loaded, scores, texts)
    names = [name for name in scores if name != BASELINE]
    series: dict[Goal, dict[str, Series]] = {
        goal: plan_series(
            scores, names, languages, objective=goal, reference=None, collapsed=collapsed, draws=draws, seed=seed
        )
        for goal in ("worst", "mean")
    }
    sizes = {control.name: control.bytes_ for control in controls} | {
        NONE: costs.total({}),
        THE_PLAN: _bytes(loaded, plan),
    }
    own = series[objective]
    standing, comparisons = _compare(own, controls)
    return Evidence(
        provenance=provenance(
            loaded.files,
            texts,
            seed=seed,
            arguments={
                "objective": objective,
                "draws": draws,
                "bank": bank,
                "random_plans": random_plans,
            },
        ),
        plan=plan,
        objective=objective,
        grid=plan.grid,
        bank=bank,
        languages=languages,
        rows=tuple(_rows(plan, controls, sizes, series)),
        standing=standing,
        comparisons=comparisons,
        frontier=pareto_frontier({name: sizes[name] for name in names}, series["worst"], series["mean"]),
        verdict=verdict(THE_PLAN, standing, comparisons),
    )


def _compare(
    series: Mapping[str, Series], controls: Sequence[Control]
) -> tuple[Standing | Undefined, tuple[Comparison, ...]]:
    own = series[THE_PLAN]
    if isinstance(own, Undefined):
        return own, ()
    random = {row.name: series[row.name] for row in controls if row.matched and row.name.startswith(RANDOM)}
    affordable = [row.name for row in controls if row.matched or row.difference < 0]
    others = {name: series[name] for name in (NONE, *affordable) if not name.startswith(RANDOM)}
    return standing_of(own, random), compare_with(own, others)


def _statuses(
    loaded: LoadedModel, scores: Mapping[str, StateScores], texts: TextSet
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Languages that the 16-bit model supports, and those of them that collapsed under a plan."""
    vocabulary = loaded.model.config.vocab_size
    measure = partial(measure_damage, scores[BASELINE], texts=texts, reference=None, vocabulary=vocabulary)
    languages = supported_languages(measure(scores[BASELINE], draws=MINIMUM_DRAWS))
    if not languages:
        raise QualityGateError(f"the 16-bit model supports none of {', '.join(texts.languages)}; judge a trained model")
    collapsed = {
        name: tuple(row.language for row in measure(state, draws=MINIMUM_DRAWS) if row.status == "collapsed")
        for name, state in scores.items()
        if name != BASELINE
    }
    return languages, {name: lost for name, lost in collapsed.items() if lost}


def _rows(
    plan: ProtectionPlan,
    controls: Sequence[Control],
    sizes: Mapping[str, int],
    series: Mapping[Goal, Mapping[str, Series]],
) -> list[EvidenceRow]:
    said: dict[str, tuple[dict[str, Precision], str, bool]] = {
        NONE: ({}, "nothing protected", False),
        THE_PLAN: (_beyond_the_grid(plan), plan.source, True),
    }
    said |= {control.name: (control.precisions, control.why, control.matched) for control in controls}
    return [
        EvidenceRow(
            name=name,
            precisions=precisions,
            bytes_=sizes[name],
            matched=matched,
            worst=_number(series["worst"][name]),
            mean=_number(series["mean"][name]),
            why=why,
        )
        for name, (precisions, why, matched) in said.items()
    ]


def _number(series: Series) -> Number:
    return series if isinstance(series, Undefined) else interval(series)
