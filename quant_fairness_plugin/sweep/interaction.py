"""Whether units act together: synergy of pairs, and whether a chosen set needs all of its members. Needs no model.

Step 4 (sweep). Takes the objective of plans, resample by resample (`plan_series`); returns intervals. The gain of a set
is the objective of the all-quantized model minus that of the plan that protects the set: above 0, protecting helps.
"""

from __future__ import annotations

from collections.abc import Mapping

from quant_fairness_plugin.artifacts import Interval, Necessity, Number, Synergy, SynergyMatrix, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import interval, ratio_interval
from quant_fairness_plugin.measure.metrics import Array
from quant_fairness_plugin.sweep.series import ALPHA, Series, adjusted_p_values, check_lengths

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
