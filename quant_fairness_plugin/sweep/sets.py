"""What the evaluated sets of units say: synergy of pairs, and whether the best sets need their members. No model.

Step 4 (sweep). Takes the rows and scores of a sweep; returns what a report says about its sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    Interval,
    Mode,
    NecessityTest,
    Objective,
    StateScores,
    SweepReport,
    SweepRow,
    SynergyMatrix,
)
from quant_fairness_plugin.sweep.interaction import necessity, synergy_matrix
from quant_fairness_plugin.sweep.ranking import BASELINE, NONE
from quant_fairness_plugin.sweep.series import Series, plan_series

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
