"""What the evaluated sets of units say: synergy of pairs, and whether the best sets need their members. No model.

Step 4 (sweep). Takes the rows and scores of a sweep; returns what a report says about its sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    Interval,
    Mode,
    Necessity,
    NecessityTest,
    Number,
    Objective,
    StateScores,
    SweepReport,
    SweepRow,
    Synergy,
    SynergyMatrix,
    Undefined,
)
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval, ratio_interval
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.statistics.series import ALPHA, Series, adjusted_p_values, check_lengths, plan_series

SET_OBJECTIVES: tuple[Objective, ...] = ("worst", "mean")
"""What sets are judged by. KL is above 0 for every state, as gains and factors need."""
Units = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedSets:
    """The rows of a sweep and their scores, all on the same resamples."""

    rows: Sequence[SweepRow]
    scores: Mapping[str, StateScores]
    languages: Sequence[str]
    """Those that the 16-bit model supports."""
    draws: int
    seed: int

    @classmethod
    def of(cls, report: SweepReport, *, draws: int = 2000) -> EvaluatedSets:
        """Those of a report."""
        supported = [name for name, status in report.languages.items() if status == "supported"]
        return cls(
            rows=report.rows, scores=report.scores, languages=supported, draws=draws, seed=report.provenance.seed
        )

    def interactions(self, modes: Sequence[Mode]) -> dict[str, SynergyMatrix]:
        """`protect-one worst` and so on → the synergies of the pairs that were evaluated; nothing without pairs."""
        found = {}
        for mode in modes:
            plans = self._plans(mode)
            pairs = {(units[0], units[1]): plan for units, plan in plans.items() if len(units) == 2}
            single = {units[0]: plan for units, plan in plans.items() if len(units) == 1}
            none = NONE if mode == "protect-one" else BASELINE
            for objective in SET_OBJECTIVES if pairs else ():
                series = self.series([none, *single.values(), *pairs.values()], objective)
                found[f"{mode} {objective}"] = synergy_matrix(
                    series[none],
                    {unit: series[plan] for unit, plan in single.items()},
                    {pair: series[plan] for pair, plan in pairs.items()},
                )
        return found

    def necessity_tests(self, sizes: Sequence[int]) -> tuple[NecessityTest, ...]:
        """Of the best evaluated set of each size, by each objective: what happens without one of its members."""
        plans = self._plans("protect-one")
        tests = []
        for size in sizes:
            for objective in SET_OBJECTIVES:
                best = self._best(size, objective)
                if best is not None:
                    tests.append(self._necessity(best, plans, objective))
        return tuple(tests)

    def series(self, plans: Sequence[str], objective: Objective) -> dict[str, Series]:
        """An objective of plans, resample by resample."""
        collapsed = {
            row.plan: [damage.language for damage in row.damage if damage.status == "collapsed"] for row in self.rows
        }
        return plan_series(
            self.scores,
            plans,
            self.languages,
            objective=objective,
            reference=None,
            collapsed=collapsed,
            draws=self.draws,
            seed=self.seed,
        )

    def _plans(self, mode: Mode) -> dict[Units, str]:
        """Units that are singled out together → plan; under `protect-one` those in 16 bit."""
        own = [row for row in self.rows if row.mode == mode and (mode == "quantize-one" or row.precision == "fp16")]
        return {row.units: row.plan for row in own}

    def _best(self, size: int, objective: Objective) -> Units | None:
        values = {
            row.units: value.estimate
            for row in self.rows
            if row.mode == "protect-one" and row.precision == "fp16" and len(row.units) == size
            if isinstance(value := row.objectives[objective], Interval)
        }
        return min(values, key=lambda units: (values[units], units)) if values else None

    def _necessity(self, chosen: Units, plans: Mapping[Units, str], objective: Objective) -> NecessityTest:
        units = [own[0] for own in plans if len(own) == 1]
        changes: dict[str, Units] = {old: tuple(unit for unit in chosen if unit != old) for old in chosen}
        for old in chosen:
            for new in units:
                if new not in chosen:
                    changes[f"{new} for {old}"] = tuple(u for u in units if u == new or (u in chosen and u != old))
        known = {change: plans[after] for change, after in changes.items() if after in plans}
        series = self.series(list(dict.fromkeys([plans[chosen], *known.values()])), objective)
        found = necessity(series[plans[chosen]], {change: series[plan] for change, plan in known.items()})
        return NecessityTest(objective=objective, units=chosen, changes=found, possible=len(changes))


Pair = tuple[str, str]


def synergy_matrix(none: Series, single: Mapping[str, Series], pairs: Mapping[Pair, Series]) -> SynergyMatrix:
    """The synergy of every pair, additive and multiplicative, with intervals.

    With `quantize` plans give the 16-bit model as `none`: its objective is 0, the additive synergy stands (above 0:
    together they hurt less than the sum of each alone), the multiplicative one is undefined.

    Args:
        none: the objective where no unit is protected, `[1 + draws]`, the estimate first.
        single: the same for each unit alone.
        pairs: the same for two units together.

    Raises:
        ConfigError: a pair of a unit that has no plan of its own, or with itself, or series of unequal length.
    """
    _check(none, single, pairs)
    sums = {pair: _additive(none, single[pair[0]], single[pair[1]], both) for pair, both in pairs.items()}
    adjusted = adjusted_p_values(sums)
    cells = [
        Synergy(
            pair=pair,
            gain=_interval(_difference(none, both)),
            gains_alone=(_interval(_difference(none, single[pair[0]])), _interval(_difference(none, single[pair[1]]))),
            additive=_interval(sums[pair]),
            multiplicative=_multiplicative(none, single[pair[0]], single[pair[1]], both, pair),
            adjusted_p=adjusted.get(pair),
        )
        for pair, both in pairs.items()
    ]
    return SynergyMatrix(units=tuple(single), pairs=tuple(cells))


def necessity(chosen: Series, changed: Mapping[str, Series]) -> tuple[Necessity, ...]:
    """Whether each change of a chosen set significantly raises its objective.

    A plan without one of its members also has fewer bytes; whether a member is better than another of its size is told
    by exchanging it (`layers.0 for layers.2`).

    Args:
        chosen: the objective of the plan that protects the set, `[1 + draws]`, the estimate first.
        changed: change → the objective of the plan after it.

    Raises:
        ConfigError: series of unequal length.
    """
    check_lengths([chosen, *changed.values()])
    rises = {name: _difference(after, chosen) for name, after in changed.items()}
    adjusted = adjusted_p_values(rises)
    found = []
    for name, rise in rises.items():
        number, p = _interval(rise), adjusted.get(name)
        needed = isinstance(number, Interval) and p is not None and number.estimate > 0 and p < ALPHA
        found.append(Necessity(change=name, rise=number, adjusted_p=p, necessary=needed))
    return tuple(found)


def _additive(none: Series, first: Series, second: Series, both: Series) -> Series:
    """Written as (D(i) - D(ij)) - (D(none) - D(j)): differences of like sizes keep their digits."""
    return _difference(_difference(first, both), _difference(none, second))


def _multiplicative(none: Series, first: Series, second: Series, both: Series, pair: Pair) -> Number:
    if isinstance(none, Undefined):
        return none
    if isinstance(first, Undefined):
        return first
    if isinstance(second, Undefined):
        return second
    if isinstance(both, Undefined):
        return both
    factors = {"with nothing protected": none, f"with {pair[0]} protected": first, f"with {pair[1]} protected": second}
    for where, value in factors.items():
        found = interval(value)
        if found.low <= 0:
            return Undefined(
                f"the objective {where} is {found.estimate:.3g} [{found.low:.3g}, {found.high:.3g}], not clearly above "
                "0: there is no factor; read the additive synergy"
            )
    return ratio_interval(both * none, first * second, what=f"the product of the objectives of {' and '.join(pair)}")


def _difference(first: Series, second: Series) -> Series:
    if isinstance(first, Undefined):
        return first
    if isinstance(second, Undefined):
        return second
    difference: Array = first - second
    return difference


def _interval(series: Series) -> Number:
    return series if isinstance(series, Undefined) else interval(series)


def _check(none: Series, single: Mapping[str, Series], pairs: Mapping[Pair, Series]) -> None:
    for first, second in pairs:
        if first == second:
            raise ConfigError(f"pair {first!r} with itself: a pair has two units")
        if lacking := [unit for unit in (first, second) if unit not in single]:
            raise ConfigError(
                f"pair {(first, second)}: no plan protects {' or '.join(lacking)} alone; evaluate it, too"
            )
    check_lengths([none, *single.values(), *pairs.values()])
