"""Which plans a sweep evaluates: everything quantized, and units singled out alone or together. Step 4, plain data.

A unit here is a whole layer (`layers.3`) or a fusion group (`layers.3.down`), by its full name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from quant_fairness_plugin.artifacts import Combinations, Grid, Mode, Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.objectives import OBJECTIVES
from quant_fairness_plugin.plans.units import BIASES, EMBEDDINGS, FINAL_NORM, HEAD, NORMS, POSITIONS, UnitMap

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
    worst = OBJECTIVES["worst"]
    plans = {unit: scores[plan_name(mode, [unit])] for unit in units}
    order = sorted(units, key=lambda unit: sign * worst.of_scores(plans[unit], tuple(plans[unit].languages)))
    leading = set(order[:count])
    return tuple(unit for unit in units if unit in leading)


BASELINE = "16 bit"


NONE = "none"


def plan_name(mode: Mode, units: Sequence[str], precision: Precision = "fp16") -> str:
    """The name of the plan that singles units out: `protect 3`, `protect 0+3.down` or `quantize 3`.

    Units that do not keep 16 bit but get another precision than the rest are named by it: `int8 3`.
    """
    what = mode.removesuffix("-one") if mode == "quantize-one" or precision == "fp16" else precision
    return f"{what} {'+'.join(unit.removeprefix('layers.') for unit in units)}"


AROUND = (EMBEDDINGS, POSITIONS, BIASES, NORMS, FINAL_NORM, HEAD)
"""What can be named. `biases` and `norms` are those of all layers at once."""


@dataclass(frozen=True, slots=True)
class AroundPlan:
    """A plan in which something besides the layers is quantized."""

    name: str
    """`quantize embeddings`, `none with embeddings+positions`, `protect 0 with embeddings+positions`."""
    mode: Mode | None
    units: tuple[str, ...]
    """What is singled out."""
    quantized: Mapping[str, Precision]
    """Full unit name → precision; all else is in 16 bit."""
    precision: Precision = "fp16"


def spell_around(names: Sequence[str], units: UnitMap) -> dict[str, tuple[str, ...]]:
    """Name → the model's units that it stands for.

    Raises:
        ConfigError: an unknown name, one twice, or something that the model does not have.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in AROUND or name in found:
            what = "listed twice" if name in found else "no unit around the layers"
            raise ConfigError(f"{name!r} is {what}; use {', '.join(AROUND)}, each once")
        own = [f"layers.{layer}.{name}" for layer in range(units.layers)] if name in (BIASES, NORMS) else [name]
        found[name] = tuple(unit for unit in own if units.parameters.get(unit))
        if not found[name]:
            has = [other for other in AROUND if _has(units, other)]
            raise ConfigError(f"the model has no {name} of its own; allowed are {', '.join(has)}. Leave it out.")
    return found


def _has(units: UnitMap, name: str) -> bool:
    return bool(units.parameters.get(f"layers.0.{name}" if name in (BIASES, NORMS) else name))


def check_around(names: Sequence[str], units: UnitMap, shapes: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
    """Refuse what the model does not have, and tables that the grid's groups do not divide.

    Args:
        names: what is to be quantized besides.
        units: the model's units.
        shapes: parameter → shape; that of a tied head may be missing, it is the embeddings'.
        grid: the grid.

    Raises:
        ConfigError: as said.
    """
    for name, own in spell_around(names, units).items():
        for parameter in (parameter for unit in own for parameter in units.parameters[unit]):
            tied = units.parameters[EMBEDDINGS][0] if name == HEAD else parameter
            check_table(parameter, shapes.get(parameter, shapes.get(tied, ())), grid, what=name)


def check_table(parameter: str, shape: Sequence[int], grid: Grid, *, what: str) -> None:
    """Refuse a table of tokens or positions whose rows the grid's groups do not divide; vectors have one scale.

    Raises:
        ConfigError: they do not.
    """
    if len(shape) == 2 and grid.group_size != -1 and shape[1] % grid.group_size:
        raise ConfigError(
            f"{what}: {parameter} has rows of {shape[1]} values, which groups of {grid.group_size} do not divide; use "
            "a group size that does, or -1"
        )


def around_plans(
    names: Sequence[str], units: UnitMap, everything: Sequence[str], modes: Sequence[Mode], quantized: Precision
) -> list[AroundPlan]:
    """The plans that a sweep evaluates besides.

    Under `quantize-one` each name is the only thing that is quantized. Under `protect-one` all of the names are
    quantized together with everything else; then each of them, and each unit of the sweep, is left in 16 bit.

    Args:
        names: what is quantized besides.
        units: the model's units.
        everything: all units that the sweep singles out.
        modes: the modes of the sweep.
        quantized: what a quantized unit gets.

    Raises:
        ConfigError: a name that cannot be used.
    """
    spelled = spell_around(names, units)
    plans: list[AroundPlan] = []
    if "quantize-one" in modes:
        plans += [
            AroundPlan(f"quantize {name}", "quantize-one", (name,), dict.fromkeys(own, quantized))
            for name, own in spelled.items()
        ]
    if names and "protect-one" in modes:
        plans.append(_together(SweptPlan(None), spelled, everything, quantized))
        if len(names) > 1:
            without = [{n: own for n, own in spelled.items() if n != left} for left in spelled]
            plans += [_together(SweptPlan(None), some, everything, quantized) for some in without]
        singles = [SweptPlan("protect-one", (unit,)) for unit in everything]
        plans += [_together(plan, spelled, everything, quantized) for plan in singles]
    return plans


def _together(
    plan: SweptPlan, spelled: Mapping[str, Sequence[str]], everything: Sequence[str], quantized: Precision
) -> AroundPlan:
    besides = dict.fromkeys((unit for own in spelled.values() for unit in own), quantized)
    chosen = plan.precisions(everything, quantized) | besides
    return AroundPlan(f"{plan.name} with {'+'.join(spelled)}", plan.mode, plan.units, chosen)
