"""Which plans a sweep evaluates: everything quantized, and units singled out alone or together. Plain data.

A unit here is a whole layer (`layers.3`), a fusion group (`layers.3.down`), or what stands around the layers
(`embeddings`), by its full name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from quant_fairness_plugin.artifacts import Combinations, Mode, Precision, StateScores, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.plans.units import UnitMap, around_units

BASELINE, NONE = "16 bit", "none"
"""The states before quantization, and with everything quantized."""
LARGEST_COMBINATION = 3
MOST_COMBINATIONS = 512
"""Sets of one size that are evaluated: all pairs of 32 layers (496), all triples of 12 (220). A report holds the scores
of every sentence under every plan, and a walk the hidden states of all plans at once."""

Score = Callable[[Mapping[str, Mapping[str, Precision]]], dict[str, StateScores]]
"""Plans by name → scores of the 16-bit model and of every plan."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Units singled out of all others, to keep 16 bit or to be the only quantized ones."""

    mode: Mode | None
    """None where nothing is singled out: everything is quantized."""
    units: tuple[str, ...] = ()
    precision: Precision = "fp16"
    """What singled-out units get while all others are quantized; `quantize-one` quantizes them like all others."""
    around: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What is quantized around the layers, by name → the model's units; simulation only."""

    @property
    def name(self) -> str:
        """`none`, `protect 3`, `protect 0+3.down`, `int8 3`, `quantize head`, `none with embeddings+positions`."""
        name = NONE if self.mode is None else plan_name(self.mode, self.units, self.precision)
        return name if self.mode == "quantize-one" or not self.around else f"{name} with {'+'.join(self.around)}"

    @property
    def keeps_16_bit(self) -> bool:
        """Whether its units keep 16 bit while all others, and nothing else, are quantized."""
        return self.mode == "protect-one" and self.precision == "fp16" and not self.around

    def precisions(self, everything: Iterable[str], quantized: Precision) -> dict[str, Precision]:
        """Return unit → precision of what is quantized; all else is in 16 bit.

        Args:
            everything: all units of the sweep.
            quantized: what a quantized unit gets.
        """
        around = dict.fromkeys((unit for members in self.around.values() for unit in members), quantized)
        if self.mode == "quantize-one":
            return dict.fromkeys((unit for unit in everything if unit in self.units), quantized) | around
        every = {unit: self.precision if unit in self.units else quantized for unit in everything}
        return {unit: precision for unit, precision in every.items() if precision != "fp16"} | around


def plan_name(mode: Mode, units: Sequence[str], precision: Precision = "fp16") -> str:
    """Return the name of the plan that singles units out: `protect 3`, `protect 0+3.down` or `quantize 3`.

    Units that do not keep 16 bit but get another precision than the rest are named by it: `int8 3`.
    """
    what = mode.removesuffix("-one") if mode == "quantize-one" or precision == "fp16" else precision
    return f"{what} {'+'.join(map(short_name, units))}"


def short_name(unit: str) -> str:
    """Return a unit's name as people write it: `3`, `3.down`, `embeddings`."""
    return Unit.parse(unit).short if Unit.is_name(unit) else unit


@dataclass(frozen=True, slots=True)
class PlanSet:
    """Which plans a sweep evaluates, beside those that quantize what stands around the layers.

    Raises:
        ConfigError: sets that cannot be evaluated, see `check_plans` and `check_precisions`.
    """

    units: tuple[str, ...]
    modes: tuple[Mode, ...]
    combine: int
    max_plans: int
    quantized: Precision
    precisions: tuple[Precision, ...] = ("fp16",)
    """What each unit is singled out at under `protect-one`; sets of units are all in 16 bit."""

    def __post_init__(self) -> None:
        check_precisions(self.precisions, self.modes, self.quantized)
        check_plans(self.modes, self.units, self.combine, self.max_plans)

    @property
    def counts(self) -> dict[int, int]:
        """Size of a set → how many units are combined in sets of that size."""
        return {size: most_units(len(self.units), size, self.max_plans) for size in range(2, self.combine + 1)}

    @property
    def combinations(self) -> dict[int, Combinations]:
        """Size of a set → how many are evaluated, of how many."""
        counts = {1: len(self.units)} | self.counts
        return {
            size: Combinations(evaluated=comb(count, size), possible=comb(len(self.units), size))
            for size, count in counts.items()
        }

    def evaluate(self, score: Score) -> tuple[list[Plan], dict[str, StateScores]]:
        """Return the plans and the scores of all of them, in one walk where every set of every size is evaluated."""
        whole = [size for size, count in self.counts.items() if count == len(self.units)]
        plans = single_plans(self.units, self.modes, self.precisions)
        plans += [plan for size in whole for mode in self.modes for plan in combined_plans(self.units, size, mode)]
        scores = score(self.precisions_of(plans))
        more = list(self._leading(scores, [size for size in self.counts if size not in whole]))
        if more:
            # The 16-bit state of the first walk stays: every plan's KL was taken against that of its own walk.
            scores = score(self.precisions_of(more)) | scores
        return plans + more, {name: scores[name] for name in (BASELINE, *(plan.name for plan in plans + more))}

    def _leading(self, scores: Mapping[str, StateScores], sizes: Sequence[int]) -> Iterator[Plan]:
        for size in sizes:
            for mode in self.modes:
                yield from combined_plans(leading_units(scores, self.units, mode, self.counts[size]), size, mode)

    def precisions_of(self, plans: Sequence[Plan]) -> dict[str, dict[str, Precision]]:
        """Return plan → unit → precision, as `Score` takes them."""
        return {plan.name: plan.precisions(self.units, self.quantized) for plan in plans}


def check_plans(
    modes: Sequence[Mode], units: Sequence[str] | None, combine: int, max_plans: int = MOST_COMBINATIONS
) -> None:
    """Refuse sets that are too large to be tried, or that would leave nothing quantized.

    Args:
        modes: the modes of the sweep.
        units: what is singled out; None where the model is not known yet.
        combine: the largest set.
        max_plans: most sets of one size.

    Raises:
        ConfigError: no mode, `combine` not 1, 2 or 3 or not fewer than the units, or `max_plans` below 1.
    """
    if not modes:
        raise ConfigError("no mode to sweep in; use protect-one, quantize-one or both")
    if not 1 <= combine <= LARGEST_COMBINATION:
        raise ConfigError(f"combine {combine} is not allowed; use 1 (single units), 2 (and pairs) or 3 (and triples)")
    if units is not None and combine >= len(units):
        raise ConfigError(
            f"combine {combine} would single out all {len(units)} units that can be quantized; use less, or "
            "granularity 'unit'"
        )
    if max_plans < 1:
        raise ConfigError(f"max_plans {max_plans} allows no pair; use 1 or more")


def check_precisions(
    precisions: Sequence[Precision], modes: Sequence[Mode], quantized: Precision | None = None
) -> None:
    """Refuse precisions that single nothing out, or nothing to rank by.

    Args:
        precisions: what units are to be singled out at.
        modes: the modes of the sweep.
        quantized: the grid's precision; None where the grid is not known yet.

    Raises:
        ConfigError: no `fp16`, the grid's own, one twice, or others than `fp16` without `protect-one`.
    """
    given = ",".join(precisions)
    if "fp16" not in precisions or len(set(precisions)) < len(precisions):
        raise ConfigError(f"precisions {given or '(none)'}: name fp16, which units are ranked by, and each one once")
    if quantized in precisions:
        raise ConfigError(f"precisions {given}: {quantized} is what all other units get; leave it out")
    if len(precisions) > 1 and "protect-one" not in modes:
        raise ConfigError(f"precisions {given} single units out of quantized ones; add mode protect-one, or use fp16")


def single_plans(
    units: Sequence[str], modes: Sequence[Mode], precisions: Sequence[Precision] = ("fp16",)
) -> list[Plan]:
    """Return everything quantized, per mode one plan a unit, and under `protect-one` one at each other precision."""
    others = [kind for kind in precisions if kind != "fp16" and "protect-one" in modes]
    return [
        Plan(None),
        *(Plan(mode, (unit,)) for mode in modes for unit in units),
        *(Plan("protect-one", (unit,), kind) for kind in others for unit in units),
    ]


def combined_plans(units: Sequence[str], size: int, mode: Mode) -> list[Plan]:
    """Return one plan for every set of `size` of the units, which stay in the order given."""
    return [Plan(mode, subset) for subset in combinations(units, size)]


def most_units(units: int, size: int, limit: int) -> int:
    """Return how many units can be combined in sets of `size` so that there are at most `limit` (1 or more) sets."""
    return max(count for count in range(size, units + 1) if comb(count, size) <= limit)


def leading_units(scores: Mapping[str, StateScores], units: Sequence[str], mode: Mode, count: int) -> tuple[str, ...]:
    """Return the `count` units that count most by themselves, in forward order.

    What counts is the worst language's KL of a unit's own plan. Unlike the objectives it is defined for collapsed
    states too, which can be combined as well as others.

    Args:
        scores: scores of the plan of every unit.
        units: all units, in forward order.
        mode: whose plans; under `protect-one` a low KL counts, under `quantize-one` a high one.
        count: how many.
    """
    sign = 1.0 if mode == "protect-one" else -1.0
    worst = OBJECTIVES["worst"]
    plans = {unit: scores[plan_name(mode, [unit])] for unit in units}
    order = sorted(units, key=lambda unit: sign * worst.of_scores(plans[unit], tuple(plans[unit].languages)))
    leading = set(order[:count])
    return tuple(unit for unit in units if unit in leading)


def around_plans(names: Sequence[str], units: UnitMap, everything: Sequence[str], modes: Sequence[Mode]) -> list[Plan]:
    """Return the plans that also quantize what stands around the layers; simulation only.

    Under `quantize-one` each name is the only thing that is quantized. Under `protect-one` all of the names are
    quantized together with everything else; then each of them, and each unit of the sweep, is left in 16 bit.

    Args:
        names: what is quantized around the layers.
        units: the model's units.
        everything: all units that the sweep singles out.
        modes: the modes of the sweep.

    Raises:
        ConfigError: a name that cannot be used.
    """
    around = around_units(names, units)
    plans: list[Plan] = []
    if "quantize-one" in modes:
        plans += [Plan("quantize-one", (name,), around={name: members}) for name, members in around.items()]
    if names and "protect-one" in modes:
        plans.append(Plan(None, around=around))
        if len(names) > 1:
            plans += [Plan(None, around={name: around[name] for name in names if name != left}) for left in names]
        plans += [Plan("protect-one", (unit,), around=around) for unit in everything]
    return plans
