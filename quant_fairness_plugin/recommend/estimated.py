"""Plans from the scores of one pass of gradients: every unit's precision under a budget or for a target. No torch.

The scores predict; a few plans near the limit are then evaluated exactly, and the best of them is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from quant_fairness_plugin.artifacts import (
    FINE_GROUPS,
    Bootstrap,
    Grid,
    Interval,
    Precision,
    ProtectionPlan,
    StateScores,
    Undefined,
    Unit,
    UnitScores,
    bits_of_precision,
    precision_order,
)
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS, Resamples
from quant_fairness_plugin.measure.metrics import Array, kl_bits_per_byte
from quant_fairness_plugin.recommend.allocated import Options
from quant_fairness_plugin.recommend.allocation import Allocation, Infeasible, Limit, allocate, weigh
from quant_fairness_plugin.recommend.assembly import Choice, bytes_of, plan_of
from quant_fairness_plugin.statistics.series import difference, number_of, plan_series

NEIGHBOURS = 3
"""Other plans that are evaluated: those that resampled sentences would have led to."""
TRIES = 8
"""Resamples that are looked at for them; each is one integer program."""
SHOWN = 8
"""Units of one precision that a sentence lists."""
SAME = 0.1
"""The choice counts as stable where the choices of two halves of the sentences are predicted within this share of it:
about what 12 sentences a language leave open of any score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is wanted of a plan."""

    limit: Limit
    menu: tuple[Precision, ...]
    """What a unit can get instead of the grid's precision, as far as format and reader allow."""
    refused: Mapping[str, Collection[Precision]] = field(default_factory=dict)
    """Unit → what of the menu format or reader do not allow for it."""
    whole_layers: bool = False
    """Give whole layers one precision, where no reader knows their units."""
    objective: str = "worst"
    weights: Mapping[str, float] | None = None
    overrides: Choice = field(default_factory=dict)
    """What the user gave."""
    strict: bool = False
    """A choice that is not stable is an error."""

    @property
    def source(self) -> str:
        """Return the demand in words, for the plan."""
        limit, what = self.limit, f"auto by {self.objective}{'' if self.weights is None else ' with weights'}"
        if limit.max_bytes is not None:
            return f"{what} within {limit.max_bytes} bytes"
        if limit.target is not None:
            return f"{what} for at most {limit.target:.4g}"
        return f"{what} under {limit.max_overhead:.0%} extra bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan near the limit."""

    name: str
    choice: dict[str, Precision]
    """What the user gave included."""
    predicted: dict[str, float]
    """Language → KL in bits per byte."""
    value: float
    """The predicted objective."""


@dataclass(frozen=True)
class Planner:
    """Scores and a demand: what they lead to."""

    scores: UnitScores
    demand: Demand

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the best predicted plan, and plans that are as good by resampled sentences.

        Raises:
            QualityGateError: no plan keeps the target or the limits.
            ConfigError: limits, weights or an objective that do not fit the scores.
        """
        choices = [self._best()]
        draws = Resamples(self._sentences, MINIMUM_DRAWS, self.scores.provenance.seed).counts[:TRIES]
        for weights in draws:
            if len(choices) > NEIGHBOURS:
                break
            other = self._other(weights)
            if other is not None and other not in choices and not self._all_16_bit(other):
                choices.append(other)
        names = ("the plan", *(f"neighbour {i}" for i in range(1, len(choices))))
        return tuple(self._candidate(name, choice) for name, choice in zip(names, choices, strict=True))

    @cached_property
    def stable(self) -> bool:
        """Whether two halves of the sentences lead to choices that are predicted almost as good."""
        if self._sentences < 2:
            return False
        best = self._candidate("", self._best()).value
        even = np.arange(self._sentences) % 2 == 0
        halves = [self._other(half.astype(np.float64)) for half in (even, ~even)]
        # For a target the halves may differ in bytes; their predicted damage is not what the choice is about.
        if self.demand.limit.target is not None:
            return all(half is not None for half in halves)
        return all(half is not None and self._candidate("", half).value <= (1 + SAME) * best for half in halves)

    def plan(
        self,
        candidates: Sequence[Candidate],
        evaluated: Mapping[str, StateScores] | None = None,
        bootstrap: Bootstrap = Bootstrap(),
        *,
        cut: Sequence[str] = (),
    ) -> ProtectionPlan:
        """Return the plan of the first candidate, or of one that exact evaluation finds measurably better.

        Args:
            candidates: from `candidates`.
            evaluated: scores of the 16-bit state and of every candidate; None where nothing was evaluated.
            bootstrap: resamples of the sentences.
            cut: what a limit of time left out of the search; goes with the reasons.

        Raises:
            QualityGateError: the choice is not stable, and the demand is strict.
        """
        chosen, measured = candidates[0], ""
        if evaluated is not None:
            chosen, measured = self.measured(candidates, evaluated, bootstrap)
        worst = max(chosen.predicted, key=lambda language: chosen.predicted[language])
        doubt = "" if self.stable else "; halves of the sentences lead to other plans"
        reasons = (
            f"{self.describe(chosen)}; predicted {self.demand.objective} {chosen.value:.4g} bits per byte, most in "
            f"{worst} ({chosen.predicted[worst]:.4g}){doubt}",
            f"scored by one pass of gradients, {self._sentences} sentences a language ({self.scores.errors})",
            *filter(None, (measured, *cut)),
        )
        if self.demand.strict and not self.stable:
            raise QualityGateError(f"the plan is unstable: {reasons[0]}; score more sentences")
        return plan_of(self.scores, chosen.choice, source=self.demand.source, reasons=reasons, stable=self.stable)

    def describe(self, candidate: Candidate) -> str:
        """Write what a candidate gives which units."""
        return describe_choice(candidate.choice, self.scores.grid, self._free)

    def measured(
        self, candidates: Sequence[Candidate], evaluated: Mapping[str, StateScores], bootstrap: Bootstrap
    ) -> tuple[Candidate, str]:
        """Return the candidate to take, and what was measured of it, in words. See `plan`."""
        names = [candidate.name for candidate in candidates]
        series = plan_series(evaluated, names, self._languages, objective=self.demand.objective, bootstrap=bootstrap)
        chosen, ahead = candidates[0], 0.0
        # What states are compared by knows no weights, so that with them the prediction alone decides.
        if self.demand.weights is None:
            for other in candidates[1:]:
                gain = number_of(difference(series[candidates[0].name], series[other.name]))
                if isinstance(gain, Interval) and gain.low > ahead:
                    chosen, ahead = other, gain.low
        figure = number_of(series[chosen.name])
        sentences = len(next(iter(evaluated[chosen.name].languages.values())).tokens)
        if isinstance(figure, Undefined):
            return chosen, f"measured on {sentences} search sentences a language: undefined, {figure.undefined}"
        others = f"; none of {len(candidates) - 1} plans near it is measurably better"
        if chosen is not candidates[0]:
            others = f"; measurably better than the plan of the best prediction ({candidates[0].value:.4g} predicted)"
        return chosen, (
            f"measured {self.demand.objective} {figure.estimate:.4g} [{figure.low:.4g}, {figure.high:.4g}] on "
            f"{sentences} search sentences a language{others if len(candidates) > 1 else ''}"
        )

    @property
    def _sentences(self) -> int:
        return len(next(iter(self.scores.bytes_.values())))

    @property
    def _languages(self) -> tuple[str, ...]:
        return tuple(self.scores.bytes_)

    @cached_property
    def _free(self) -> tuple[str, ...]:
        """What gets a precision: units, or layers, that the user gave none."""
        given = {Unit.parse(name) for name in self.demand.overrides}
        units = [Unit.parse(name) for name in self.scores.units]
        if self.demand.whole_layers:
            layers = dict.fromkeys(unit.whole for unit in units)
            taken = {unit.whole for unit in given}
            return tuple(str(layer) for layer in layers if layer not in taken)
        return tuple(str(unit) for unit in units if unit not in given and unit.whole not in given)

    def _kl(self, unit: str, kind: Precision, weights: Array) -> dict[str, float]:
        """Bits per byte that a unit, or the units of a layer, cause at a precision."""
        layer = Unit.parse(unit)
        members = [name for name in self.scores.units if name == unit or Unit.parse(name).whole == layer]
        return {
            language: kl_bits_per_byte(
                sum(float(weights @ np.array(self.scores.kl_nats[name][kind][language])) for name in members)
                if kind != "fp16"
                else 0.0,
                float(weights @ np.array(self.scores.bytes_[language])),
            )
            for language in self._languages
        }

    def _options(self, weights: Array | None = None) -> Options:
        """What to choose from, with the sentences weighted."""
        weights = np.ones(self._sentences) if weights is None else weights
        quantized, given = self.scores.grid.precision, self.demand.overrides
        kinds = {unit: self._kinds(unit) for unit in self._free}
        floor = bytes_of(self.scores, given)
        bytes_ = {
            unit: {kind: bytes_of(self.scores, {**given, unit: kind}) - floor for kind in kinds[unit]}
            for unit in self._free
        }
        damage = {unit: {kind: self._kl(unit, kind, weights) for kind in kinds[unit]} for unit in self._free}
        base = dict.fromkeys(self._languages, 0.0)
        for name in self.scores.units:
            unit = Unit.parse(name)
            if name in bytes_ or str(unit.whole) in bytes_:
                continue
            kind = given.get(name, given.get(str(unit.whole), quantized))
            for language, added in self._kl(name, kind, weights).items():
                base[language] += added
        return Options(bytes_=bytes_, damage=damage, base=base, other_bytes=floor, quantized=quantized)

    def _kinds(self, unit: str) -> tuple[Precision, ...]:
        """Return what a unit, or the units of a layer, can get."""
        layer = Unit.parse(unit)
        members = [name for name in self.scores.units if name == unit or Unit.parse(name).whole == layer]
        refused = {kind for name in members for kind in self.demand.refused.get(name, ())}
        kinds = dict.fromkeys((self.scores.grid.precision, *self.demand.menu))
        return tuple(kind for kind in kinds if kind not in refused)

    def _best(self) -> dict[str, Precision]:
        """The best choice by all sentences.

        Raises:
            QualityGateError: there is none.
        """
        allocation = self._allocate(self._options())
        if isinstance(allocation, Infeasible):
            raise QualityGateError(f"no plan by these limits: {allocation.reason}")
        choice = self._choice(allocation)
        if not self._all_16_bit(choice):
            return choice
        if self.demand.limit.target is not None:
            raise QualityGateError(
                f"target {self.demand.limit.target:.4g} takes 16 bit for every unit, so that nothing would be "
                "quantized: raise it"
            )
        # A budget that pays for everything still asks for a quantized model: of the unit that loses least.
        least = min(self._free, key=self._worst_on_grid)
        del choice[least]
        if "int8" in self._kinds(least):
            choice[least] = "int8"
        return choice

    def _all_16_bit(self, choice: Choice) -> bool:
        return set(self._free) <= {unit for unit, kind in choice.items() if kind == "fp16"}

    def _worst_on_grid(self, unit: str) -> float:
        return max(self._kl(unit, self.scores.grid.precision, np.ones(self._sentences)).values())

    def _other(self, weights: Array) -> dict[str, Precision] | None:
        """The best choice by weighted sentences; None where there is none."""
        allocation = self._allocate(self._options(weights))
        return None if isinstance(allocation, Infeasible) else self._choice(allocation)

    def _allocate(self, options: Options) -> Allocation | Infeasible:
        limit = self.demand.limit
        if not options.bytes_:
            raise ConfigError("every unit has a precision from the user already; leave some to auto, or name the plan")
        return allocate(
            options.bytes_,
            options.damage,
            replace(limit, max_bytes=limit.budget(bytes_of(self.scores, {})), max_overhead=None),
            base=options.base,
            other_bytes=options.other_bytes,
            objective=self.demand.objective,
            weights=self.demand.weights,
        )

    def _choice(self, allocation: Allocation) -> dict[str, Precision]:
        quantized = self.scores.grid.precision
        raised = {unit: allocation.units[unit] for unit in self._free if allocation.units[unit] != quantized}
        return {**self.demand.overrides, **raised}

    def _candidate(self, name: str, choice: dict[str, Precision]) -> Candidate:
        options = self._options()
        predicted = options.predicted(choice)
        value = weigh(predicted, self.demand.objective, self.demand.weights)
        return Candidate(name=name, choice=choice, predicted=predicted, value=value)


def describe_choice(choice: Choice, grid: Grid, free: Sequence[str]) -> str:
    """Write a choice as `INT8 for 3.down, 5.qkv; 16 bit for 0.o; the rest INT4 g64`.

    Args:
        choice: unit → what it gets instead of the grid's precision.
        grid: of the others.
        free: all units that there were to choose for.
    """
    size = "a scale a row" if grid.group_size == -1 else f"g{grid.group_size}"
    rest = f"{grid.precision.upper()} {size}"
    kinds = sorted(set(choice.values()), key=precision_order)
    if not kinds:
        return f"everything {rest}"
    parts = []
    for kind in kinds:
        units = [unit for unit, given in choice.items() if given == kind]
        groups = " g32" if kind == FINE_GROUPS else ""
        name = "16 bit" if kind == "fp16" else f"INT{bits_of_precision(kind)}{groups}"
        parts.append(f"{name} for {'all units' if set(free) <= set(units) else _some(units)}")
    return "; ".join(parts if set(free) <= set(choice) else [*parts, f"the rest {rest}"])


def _some(units: Sequence[str]) -> str:
    shown = ", ".join(Unit.parse(unit).short for unit in units[:SHOWN])
    return f"{shown} and {len(units) - SHOWN} more" if len(units) > SHOWN else shown
