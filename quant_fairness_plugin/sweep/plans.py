"""Which plans a sweep evaluates: everything quantized, and units singled out alone or together. Step 4, plain data.

A unit here is a whole layer (`layers.3`) or a fusion group (`layers.3.down`), by its full name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from quant_fairness_plugin.artifacts import Combinations, Mode, Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.sweep.ranking import BASELINE, NONE, plan_name

LARGEST_COMBINATION = 3
MOST_COMBINATIONS = 512
"""Sets of one size that are evaluated: all pairs of 32 layers (496), all triples of 12 (220). A report holds the scores
of every sentence under every plan, and a walk the hidden states of all plans at once."""


Score = Callable[[Mapping[str, Mapping[str, Precision]]], dict[str, StateScores]]
"""Plans by name → scores of the 16-bit model and of every plan."""


@dataclass(frozen=True, slots=True)
class SweptPlan:
    """Units singled out of all others, to keep 16 bit or to be the only quantized ones."""

    mode: Mode | None
    """None where nothing is singled out: everything is quantized."""
    units: tuple[str, ...] = ()
    precision: Precision = "fp16"
    """What singled-out units get while all others are quantized; `quantize-one` quantizes them like all others."""

    @property
    def name(self) -> str:
        """`none`, `protect 3`, `protect 0+3.down`, `int8 3`, `quantize 3`."""
        return NONE if self.mode is None else plan_name(self.mode, self.units, self.precision)

    @property
    def keeps_16_bit(self) -> bool:
        """Whether its units keep 16 bit while all others are quantized."""
        return self.mode == "protect-one" and self.precision == "fp16"

    def precisions(self, everything: Iterable[str], quantized: Precision) -> dict[str, Precision]:
        """Unit → precision of what is quantized; all else is in 16 bit.

        Args:
            everything: all units of the sweep.
            quantized: what a quantized unit gets.
        """
        if self.mode == "quantize-one":
            return dict.fromkeys((unit for unit in everything if unit in self.units), quantized)
        given = {unit: self.precision if unit in self.units else quantized for unit in everything}
        return {unit: precision for unit, precision in given.items() if precision != "fp16"}


@dataclass(frozen=True, slots=True)
class PlanSet:
    """Which plans a sweep evaluates."""

    units: tuple[str, ...]
    modes: tuple[Mode, ...]
    combine: int
    max_plans: int
    quantized: Precision
    precisions: tuple[Precision, ...] = ("fp16",)
    """What each unit is singled out at under `protect-one`; sets of units are all in 16 bit."""

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

    def evaluate(self, score: Score) -> tuple[list[SweptPlan], dict[str, StateScores]]:
        """The plans and the scores of all of them, in one walk where every set of every size is wanted."""
        whole = [size for size, count in self.counts.items() if count == len(self.units)]
        plans = single_plans(self.units, self.modes, self.precisions)
        plans += [plan for size in whole for mode in self.modes for plan in combined_plans(self.units, size, mode)]
        scores = score(self.spelled_out(plans))
        more = list(self._leading(scores, [size for size in self.counts if size not in whole]))
        if more:
            # The 16-bit state of the first walk stays: every plan's KL was taken against that of its own walk.
            scores = score(self.spelled_out(more)) | scores
        return plans + more, {name: scores[name] for name in (BASELINE, *(plan.name for plan in plans + more))}

    def _leading(self, scores: Mapping[str, StateScores], sizes: Sequence[int]) -> Iterator[SweptPlan]:
        for size in sizes:
            for mode in self.modes:
                yield from combined_plans(leading_units(scores, self.units, mode, self.counts[size]), size, mode)

    def spelled_out(self, plans: Sequence[SweptPlan]) -> dict[str, dict[str, Precision]]:
        """Plan → unit → precision, as `Score` takes them."""
        return {plan.name: plan.precisions(self.units, self.quantized) for plan in plans}


def check_plans(modes: Sequence[Mode], units: Sequence[str], combine: int, max_plans: int = MOST_COMBINATIONS) -> None:
    """Refuse sets that are too large to be tried, or that would leave nothing quantized.

    Raises:
        ConfigError: no mode, `combine` not 1, 2 or 3 or not fewer than the units, or `max_plans` below 1.
    """
    if not modes:
        raise ConfigError("no mode to sweep in; use protect-one, quantize-one or both")
    if not 1 <= combine <= LARGEST_COMBINATION:
        raise ConfigError(f"combine {combine} is not allowed; use 1 (single units), 2 (and pairs) or 3 (and triples)")
    if combine >= len(units):
        raise ConfigError(
            f"combine {combine} would single out all {len(units)} units that can be quantized; use less, or "
            "granularity 'unit'"
        )
    if max_plans < 1:
        raise ConfigError(f"max_plans {max_plans} allows no pair; use 1 or more")


def check_precisions(precisions: Sequence[Precision], modes: Sequence[Mode], quantized: Precision) -> None:
    """Refuse precisions that single nothing out, or nothing to rank by.

    Args:
        precisions: what units are to be singled out at.
        modes: the modes of the sweep.
        quantized: the grid's own precision.

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
) -> list[SweptPlan]:
    """Everything quantized, then per mode one plan a unit, and under `protect-one` one at each other precision."""
    others = [kind for kind in precisions if kind != "fp16" and "protect-one" in modes]
    return [
        SweptPlan(None),
        *(SweptPlan(mode, (unit,)) for mode in modes for unit in units),
        *(SweptPlan("protect-one", (unit,), kind) for kind in others for unit in units),
    ]


def combined_plans(units: Sequence[str], size: int, mode: Mode) -> list[SweptPlan]:
    """One plan for every set of `size` of the units, which stay in the order given."""
    return [SweptPlan(mode, chosen) for chosen in combinations(units, size)]


def most_units(units: int, size: int, limit: int) -> int:
    """How many units can be combined in sets of `size` so that there are at most `limit` (1 or more) sets."""
    return max(count for count in range(size, units + 1) if comb(count, size) <= limit)


def leading_units(scores: Mapping[str, StateScores], units: Sequence[str], mode: Mode, count: int) -> tuple[str, ...]:
    """The `count` units that count most by themselves, in forward order.

    What counts is the worst language's KL of a unit's own plan. Unlike the objectives it is defined for collapsed
    states too, which can be combined as well as others.

    Args:
        scores: scores of the plan of every unit.
        units: all units, in forward order.
        mode: whose plans; under `protect-one` a low KL counts, under `quantize-one` a high one.
        count: how many.
    """
    sign = 1.0 if mode == "protect-one" else -1.0
    order = sorted(units, key=lambda unit: sign * _worst_kl(scores[plan_name(mode, [unit])]))
    leading = set(order[:count])
    return tuple(unit for unit in units if unit in leading)


def _worst_kl(scores: StateScores) -> float:
    return max(sum(row.kl_nats) / sum(row.bytes_) for row in scores.languages.values())
