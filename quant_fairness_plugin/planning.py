"""The plan of `auto`: scores of units, what format and reader allow, a limit, and a few exact evaluations.

Takes a model, texts and a `FairConfig`; returns `UnitScores`, and from them a `ProtectionPlan`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Precision,
    ProtectionPlan,
    StateScores,
    TextSet,
    Unit,
    UnitScores,
)
from quant_fairness_plugin.checkpoint.readers import find_refusal
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.parsers import read_target
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.one_token import check_walkable
from quant_fairness_plugin.model.streamed import budget_of
from quant_fairness_plugin.plans.costs import (
    bytes_at_bits,
    count_bytes,
    layers_and_overrides,
    layers_budget,
    plan_bytes,
    with_columns,
)
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.recommend import Limit
from quant_fairness_plugin.recommend.assembly import Choice
from quant_fairness_plugin.recommend.estimated import Candidate, Demand, Planner
from quant_fairness_plugin.sweep.bank import Bank, RtnBank
from quant_fairness_plugin.sweep.engine import support_of
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.fisher import check_linear, spread
from quant_fairness_plugin.sweep.model_bank import ModelBank
from quant_fairness_plugin.sweep.sampling import EXACT_BY_SCORED, EXACT_SENTENCES, SENTENCES, Sampling, SearchTime
from quant_fairness_plugin.sweep.streaming import score_plans_layerwise
from quant_fairness_plugin.sweep.unit_scores import score_units
from quant_fairness_plugin.texts.languages import normalise_language
from quant_fairness_plugin.texts.parts import overlap

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def limit_of(loaded: LoadedModel, config: FairConfig) -> Limit:
    """Return what bounds a plan: the configuration's size, bits, target or overhead, and its limits of languages."""
    languages = {normalise_language(name): value for name, value in (config.limits or {}).items()}
    if config.target is not None:
        return Limit(target=read_target(config.target)[1], languages=languages)
    if config.max_size is not None:
        return Limit(max_bytes=config.max_size, languages=languages)
    if config.target_bits is not None:
        table, other = count_bytes(loaded, config.grid, eight_bit_tables=config.eight_bit_tables)
        return Limit(max_bytes=bytes_at_bits(table, other, config.target_bits), languages=languages)
    share = layers_budget(loaded, config.grid, config.protect_columns, config.max_overhead)
    return Limit(max_overhead=share, languages=languages)


def menu_of(loaded: LoadedModel, config: FairConfig) -> tuple[tuple[Precision, ...], bool]:
    """Return what `auto` can give instead of the grid's precision, and whether to whole layers only.

    The default is cut to what format and reader allow; what the user named has been checked before.
    """
    groups = loaded.family.units_of(0)
    for place, whole_layers in ((Unit(0, groups[0].name), False), (Unit(0), True)):
        allowed = tuple(kind for kind in config.menu if not _refused(loaded, config, {str(place): kind}))
        if allowed:
            return allowed, whole_layers
    return ("fp16",), True


def _refused(loaded: LoadedModel, config: FairConfig, overrides: Mapping[str, Precision]) -> bool:
    form, reader = config.format, config.reader
    return find_refusal(loaded.family, format=form, grid=config.grid, reader=reader, overrides=overrides) is not None


def _refused_units(
    loaded: LoadedModel, config: FairConfig, scores: UnitScores, menu: Collection[Precision]
) -> dict[str, tuple[Precision, ...]]:
    """Return what of a menu format or reader do not allow for some units, such as 8 bits for experts."""
    by_group: dict[str | None, tuple[Precision, ...]] = {}
    for name in scores.units:
        if (group := Unit.parse(name).group) not in by_group:
            by_group[group] = tuple(kind for kind in menu if _refused(loaded, config, {name: kind}))
    return {name: by_group[Unit.parse(name).group] for name in scores.units}


def check_budget(loaded: LoadedModel, config: FairConfig) -> None:
    """Refuse a budget that no plan keeps, before anything is quantized for it.

    Raises:
        QualityGateError: what is quantized as far as the configuration lets it is larger.
        ConfigError: 16-bit input channels alone take more than the extra bytes.
    """
    most = limit_of(loaded, config).max_bytes
    if most is None:
        return
    kinds = tuple(config.overrides.values())
    table, other = count_bytes(loaded, config.grid, kinds, eight_bit_tables=config.eight_bit_tables)
    dense, overrides = layers_and_overrides(config.overrides)
    least = plan_bytes(table, other, dense, overrides, quantized=config.grid.precision)
    if least > most:
        raise QualityGateError(
            f"a budget of {most} bytes is below the smallest checkpoint of this grid, {least} bytes: raise it to that, "
            "or use fewer --bits"
        )


def check_supported(loaded: LoadedModel, texts: TextSet, config: FairConfig) -> None:
    """Refuse languages that nothing can be planned for, before anything is quantized for their scores.

    Looked at are the languages with a limit; where there is none, one after another until the 16-bit model knows one.

    Raises:
        ConfigError: a limit of a language that the 16-bit model does not support.
        QualityGateError: it supports none.
    """
    units, part = map_units(loaded), texts.part("search")
    scorer = partial(
        score_plans_layerwise, loaded, units=units, bank=RtnBank(loaded, units, config.grid, keep=False),
        execution=Execution(memory_budget=budget_of(loaded)),
    )  # fmt: skip
    limits = limit_of(loaded, config).languages
    limited = [language for language in part.languages if normalise_language(language) in limits]
    for language in limited or part.languages:
        try:
            support_of(loaded, part.choose((language,)), scorer)
        except QualityGateError as err:
            if limited:
                raise ConfigError(f"limit of {language}: {err}; leave it out") from err
            continue
        if not limited:
            return
    if not limited:
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(part.languages)}, so no plan can be chosen by what they "
            "lose; name the layers with --protect-layers, or use a trained model"
        )


def check_scorable(loaded: LoadedModel) -> None:
    """Refuse a model that gradients cannot score, before anything is quantized for it. One token is run.

    Raises:
        UnsupportedModelError: a unit holds a weight that belongs to no linear module, or layers take more from earlier
            ones than a hidden state.
    """
    check_linear(loaded, map_units(loaded))
    check_walkable(loaded)


def scoring_bank(loaded: LoadedModel, config: FairConfig, bare: QuantizedModel | None) -> Bank:
    """Return the weights that scores are about: of a quantized model where there is one, else rounded to nearest."""
    units = map_units(loaded)
    rounded = RtnBank(loaded, units, config.grid, keep=False)
    return rounded if bare is None else ModelBank(units, bare, rounded)


def quantizes_first(config: FairConfig) -> bool:
    """Return whether scores take the errors of the method itself, quantizing once without protection.

    Otherwise those of rounding to nearest: of other tools, and where scales move between modules, errors of one unit
    are none of its own.
    """
    method = find_method(config.method)
    return config.backend == NATIVE and method.needs_calibration and not method.moves_scales


def made_as(quantized: QuantizedModel, config: FairConfig) -> bool:
    """Return whether a model was quantized by the method and the grid of a configuration."""
    method = find_method(config.method).at(config.effort)
    settings = method.settings if config.backend == NATIVE else {}
    return (quantized.method, quantized.settings, quantized.grid) == (method.name, settings, config.grid)


def score(
    loaded: LoadedModel,
    texts: TextSet,
    config: FairConfig,
    bank: Bank,
    *,
    search: SearchTime | None = None,
    progress: Progress | None = None,
) -> UnitScores:
    """Score every unit on the search part, at every precision of the menu and of what the user gave.

    Where a time for the search does not hold all sentences, as many as it holds are scored.
    """
    menu, _ = menu_of(loaded, config)
    kinds = tuple(dict.fromkeys((*menu, *config.overrides.values())))
    units = map_units(loaded)
    scores = score_units(
        loaded, texts.part("search"), grid=config.grid, menu=kinds, units=units, bank=bank,
        sampling=Sampling(sentences=config.sentences or SENTENCES, seed=config.seed, search=search), progress=progress,
    )  # fmt: skip
    return replace(scores, condition=overlap(texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What is heard of a search while it goes on."""

    progress: Progress | None = None
    best: Callable[[str], None] = lambda words: None
    """Called with the best plan so far, in words."""


def plan_by_scores(
    loaded: LoadedModel,
    texts: TextSet,
    config: FairConfig,
    scores: UnitScores,
    bank: Bank | None,
    *,
    search: SearchTime | None = None,
    watched: Watched = Watched(),
) -> ProtectionPlan:
    """Return the plan that scores lead to, after exact evaluation of it and its neighbours where there is a bank.

    With a time for the search, plans are evaluated one after another, as long as the next one fits.

    Raises:
        QualityGateError: no plan keeps the target or the limits, or the choice is unstable and `strict` is set.
        ConfigError: limits of languages that do not count.
    """
    menu, whole_layers = menu_of(loaded, config)
    # Scores say nothing of the format that a plan is for.
    _, other_bytes = count_bytes(loaded, scores.grid, eight_bit_tables=config.eight_bit_tables)
    scores = replace(scores, other_bytes=other_bytes)
    planner = Planner(
        scores,
        Demand(
            limit=limit_of(loaded, config), menu=menu, whole_layers=whole_layers, objective=config.decides_by,
            overrides=config.overrides, strict=config.strict, refused=_refused_units(loaded, config, scores, menu),
        ),
    )  # fmt: skip
    candidates: Sequence[Candidate] = planner.candidates()
    first = candidates[0]
    watched.best(f"{planner.describe(first)}; predicted {config.decides_by} {first.value:.4g}")
    cut = _scored_of(texts, config, scores, search)
    bootstrap, evaluated = replace(config.bootstrap, reference=None), None
    if bank is not None:
        some = spread(texts.part("search").choose(tuple(scores.bytes_)), config.sentences or EXACT_SENTENCES)
        exactly = Exactly(planner, loaded, some, bank, config.grid.precision, watched, bootstrap)
        if search is None:
            evaluated = exactly.evaluate(candidates)
        else:
            candidates, evaluated, stopped = exactly.in_time(candidates, search)
            cut = (*cut, *stopped)
        if search is not None:
            cut = cut or (f"--time {search.text} cut nothing",)
            if search.left < 0:
                cut = (*cut, f"the search took longer than --time {search.text}: what was begun was finished")
    plan = planner.plan(candidates, evaluated, bootstrap, cut=cut)
    return with_columns(plan, loaded, config.protect_columns)


def _scored_of(texts: TextSet, config: FairConfig, scores: UnitScores, search: SearchTime | None) -> tuple[str, ...]:
    """Say how many sentences there was no time to score."""
    wanted = min(config.sentences or SENTENCES, len(texts.part("search")))
    scored = len(next(iter(scores.bytes_.values())))
    if search is None or scored >= wanted:
        return ()
    return (f"scored on {scored} instead of {wanted} sentences a language by --time {search.text}",)


@dataclass(frozen=True, slots=True)
class Exactly:
    """Exact evaluations of plans on some sentences."""

    planner: Planner
    loaded: LoadedModel
    texts: TextSet
    bank: Bank
    quantized: Precision
    watched: Watched
    bootstrap: Bootstrap

    def evaluate(self, candidates: Sequence[Candidate]) -> dict[str, StateScores]:
        """Return the scores of the 16-bit state and of the candidates, which share what they can of the work."""
        scores = self.planner.scores
        grid = dict.fromkeys(scores.units, self.quantized)
        plans = {candidate.name: {**grid, **_by_unit(scores, candidate.choice)} for candidate in candidates}
        return score_plans_layerwise(
            self.loaded, plans, self.texts, units=map_units(self.loaded), bank=self.bank,
            execution=Execution(memory_budget=budget_of(self.loaded)), progress=self.watched.progress,
        )  # fmt: skip

    def in_time(
        self, candidates: Sequence[Candidate], search: SearchTime
    ) -> tuple[Sequence[Candidate], dict[str, StateScores] | None, tuple[str, ...]]:
        """Evaluate one candidate after another while the next one fits into what is left of the time.

        Returns:
            The candidates that were evaluated, the first one where none was; their scores; what was cut, in words.
        """
        evaluated: dict[str, StateScores] = {}
        longest = (search.sentence or 0.0) * EXACT_BY_SCORED * len(self.texts)
        for done, candidate in enumerate(candidates):
            if search.left < longest:
                return self._stopped(candidates, done, evaluated, search)
            before = search.left
            evaluated |= self.evaluate([candidate])
            taken = before - search.left
            longest = max(longest, taken) if done else taken
            best, words = self.planner.measured(candidates[: done + 1], evaluated, self.bootstrap)
            self.watched.best(f"{self.planner.describe(best)}; {words}")
        return candidates, evaluated, ()

    def _stopped(
        self, candidates: Sequence[Candidate], done: int, evaluated: dict[str, StateScores], search: SearchTime
    ) -> tuple[Sequence[Candidate], dict[str, StateScores] | None, tuple[str, ...]]:
        said = f"stopped by --time {search.text} after {done} of {len(candidates)} exact plans; best so far: "
        if not done:
            return candidates[:1], None, (f"{said}{self.planner.describe(candidates[0])}, by prediction alone",)
        best, _ = self.planner.measured(candidates[:done], evaluated, self.bootstrap)
        return candidates[:done], evaluated, (f"{said}{self.planner.describe(best)}",)


def _by_unit(scores: UnitScores, choice: Choice) -> dict[str, Precision]:
    """A choice with layers replaced by their units; a unit's own precision wins."""
    layers = {name: kind for name, kind in choice.items() if Unit.parse(name).group is None}
    units = {unit: layers[whole] for unit in scores.units if (whole := str(Unit.parse(unit).whole)) in layers}
    return units | {name: kind for name, kind in choice.items() if name not in layers}
