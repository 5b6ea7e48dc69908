"""What the evaluated sets of units say: synergy of pairs, and whether the best sets need their members.

`EvaluatedSets` takes the rows and scores of a sweep and returns what a report says about its sets; the functions below
it take series of any plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Interval,
    Mode,
    Necessity,
    NecessityTest,
    Number,
    StateScores,
    SweepReport,
    SweepRow,
    Synergy,
    SynergyMatrix,
    Undefined,
)
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval, ratio_interval
from quant_fairness_plugin.measure.objectives import set_objectives
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.statistics.series import (
    ALPHA,
    Series,
    adjusted_p_values,
    check_lengths,
    difference,
    number_of,
    plan_series,
)

Units = tuple[str, ...]
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedSets:
    """The rows of a sweep and their scores, all on the same resamples.

    Sets are judged by the objectives of `set_objectives`.
    """

    rows: Sequence[SweepRow]
    scores: Mapping[str, StateScores]
    languages: Sequence[str]
    """Those that the 16-bit model supports."""
    bootstrap: Bootstrap

    @classmethod
    def of(cls, report: SweepReport, *, draws: int = 2000) -> EvaluatedSets:
        """Return those of a report."""
        supported = [name for name, status in report.languages.items() if status == "supported"]
        bootstrap = Bootstrap(report.reference, draws, report.provenance.seed)
        return cls(rows=report.rows, scores=report.scores, languages=supported, bootstrap=bootstrap)

    def interactions(self, modes: Sequence[Mode]) -> dict[str, SynergyMatrix]:
        """Return the synergies of the evaluated pairs as `protect-one worst` and so on; nothing without pairs."""
        matrices = {}
        for mode in modes:
            plans = self._plans(mode)
            pairs = {(units[0], units[1]): plan for units, plan in plans.items() if len(units) == 2}
            single = {units[0]: plan for units, plan in plans.items() if len(units) == 1}
            none = NONE if mode == "protect-one" else BASELINE
            for objective in set_objectives() if pairs else ():
                series = self.series([none, *single.values(), *pairs.values()], objective)
                matrices[f"{mode} {objective}"] = synergy_matrix(
                    series[none],
                    {unit: series[plan] for unit, plan in single.items()},
                    {pair: series[plan] for pair, plan in pairs.items()},
                )
        return matrices

    def necessity_tests(self, sizes: Sequence[int]) -> tuple[NecessityTest, ...]:
        """Return, for the best evaluated set of each size and objective, what happens without one of its members."""
        plans = self._plans("protect-one")
        best = [(objective, self._best(size, objective)) for size in sizes for objective in set_objectives()]
        return tuple(self._necessity(units, plans, objective) for objective, units in best if units is not None)

    def series(self, plans: Sequence[str], objective: str) -> dict[str, Series]:
        """Return an objective of plans, resample by resample."""
        collapsed = {
            row.plan: [damage.language for damage in row.damage if damage.status == "collapsed"] for row in self.rows
        }
        return plan_series(
            self.scores, plans, self.languages, objective=objective, bootstrap=self.bootstrap, collapsed=collapsed
        )

    def _plans(self, mode: Mode) -> dict[Units, str]:
        """Units that are singled out together → plan; under `protect-one` those in 16 bit."""
        rows = [row for row in self.rows if row.mode == mode and (mode == "quantize-one" or row.precision == "fp16")]
        return {row.units: row.plan for row in rows}

    def _best(self, size: int, objective: str) -> Units | None:
        values = {
            row.units: value.estimate
            for row in self.rows
            if row.mode == "protect-one" and row.precision == "fp16" and len(row.units) == size
            # A report that is older than the objective has no value of it.
            if isinstance(value := row.objectives.get(objective), Interval)
        }
        return min(values, key=lambda units: (values[units], units)) if values else None

    def _necessity(self, best: Units, plans: Mapping[Units, str], objective: str) -> NecessityTest:
        units = [members[0] for members in plans if len(members) == 1]
        changes: dict[str, Units] = {old: tuple(unit for unit in best if unit != old) for old in best}
        for old in best:
            for new in units:
                if new not in best:
                    changes[f"{new} for {old}"] = tuple(u for u in units if u == new or (u in best and u != old))
        known = {change: plans[after] for change, after in changes.items() if after in plans}
        series = self.series(list(dict.fromkeys([plans[best], *known.values()])), objective)
        tests = necessity(series[plans[best]], {change: series[plan] for change, plan in known.items()})
        return NecessityTest(objective=objective, units=best, changes=tests, possible=len(changes))


def synergy_matrix(none: Series, single: Mapping[str, Series], pairs: Mapping[Pair, Series]) -> SynergyMatrix:
    """Return the synergy of every pair, additive and multiplicative, with intervals.

    With `quantize` plans give the 16-bit model as `none`: its objective is 0, the additive synergy stands (above 0:
    together they hurt less than the sum of each alone), the multiplicative one is undefined.

    Args:
        none: the objective where no unit is protected, `[1 + draws]`, the estimate first.
        single: the same for each unit alone.
        pairs: the same for two units together.

    Raises:
        ConfigError: a pair of a unit without a plan for it alone, or of a unit with itself, or unequal lengths.
    """
    _check(none, single, pairs)
    # Written as (D(i) - D(ij)) - (D(none) - D(j)): differences of like sizes keep their digits.
    sums = {
        (i, j): difference(difference(single[i], both), difference(none, single[j])) for (i, j), both in pairs.items()
    }
    adjusted = adjusted_p_values(sums)
    cells = [
        Synergy(
            pair=(i, j),
            gain=number_of(difference(none, both)),
            gains_alone=(number_of(difference(none, single[i])), number_of(difference(none, single[j]))),
            additive=number_of(sums[i, j]),
            multiplicative=_multiplicative(none, single[i], single[j], both, (i, j)),
            adjusted_p=adjusted.get((i, j)),
        )
        for (i, j), both in pairs.items()
    ]
    return SynergyMatrix(units=tuple(single), pairs=tuple(cells))


def necessity(best: Series, changed: Mapping[str, Series]) -> tuple[Necessity, ...]:
    """Test whether each change of a set significantly raises its objective.

    A plan without one of its members also has fewer bytes; whether a member is better than another of its size shows
    where it is exchanged (`layers.0 for layers.2`).

    Args:
        best: the objective of the plan that protects the set, `[1 + draws]`, the estimate first.
        changed: change → the objective of the plan after it.

    Raises:
        ConfigError: series of unequal length.
    """
    check_lengths([best, *changed.values()])
    rises = {name: difference(after, best) for name, after in changed.items()}
    adjusted = adjusted_p_values(rises)
    return tuple(_necessity(name, number_of(rise), adjusted.get(name)) for name, rise in rises.items())


def _necessity(change: str, rise: Number, p: float | None) -> Necessity:
    needed = isinstance(rise, Interval) and p is not None and rise.estimate > 0 and p < ALPHA
    return Necessity(change=change, rise=rise, adjusted_p=p, necessary=needed)


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
        number = interval(value)
        if number.low <= 0:
            return Undefined(
                f"the objective {where} is {number.estimate:.3g} [{number.low:.3g}, {number.high:.3g}], not clearly "
                "above 0: there is no factor; read the additive synergy"
            )
    return ratio_interval(both * none, first * second, what=f"the product of the objectives of {' and '.join(pair)}")


def _check(none: Series, single: Mapping[str, Series], pairs: Mapping[Pair, Series]) -> None:
    for first, second in pairs:
        if first == second:
            raise ConfigError(f"pair {first!r} with itself: a pair has two units")
        if lacking := [unit for unit in (first, second) if unit not in single]:
            raise ConfigError(
                f"pair {(first, second)}: no plan protects {' or '.join(lacking)} alone; evaluate it, too"
            )
    check_lengths([none, *single.values(), *pairs.values()])
