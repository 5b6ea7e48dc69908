"""Plans that need no search, at the same true bytes as a given plan: what a searched plan has to beat. Needs no model.

Takes the bytes of every unit in every precision and scores per layer; returns `Control` plans. Each is a family of
sets, one per number of members; the member count whose bytes come nearest is taken, and `matched` says whether that is
within half the smallest layer. Protecting the largest single weights is not among them: a mask needs bytes that no
checkpoint format here can store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quant_fairness_plugin.artifacts import Precision, precision_order
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.costs import Costs

GATEWAY_DEPTH = 0.75
GATEWAY_TARGET = 0.7
RANDOM_PLANS = 20
TRIES_PER_PLAN = 200
"""Random orders tried per random plan, before fewer plans than `count` are returned."""
Sets = Callable[[int], Sequence[int]]
"""Number of members → the places (in forward order) of the members."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One plan to compare with."""

    name: str
    precisions: dict[str, Precision]
    """Of the units that do not have the grid's own precision."""
    bytes_: int
    difference: int
    """Bytes above (below: negative) those of the plan it is a control for."""
    matched: bool
    """Equal bytes within half of the cheapest unit; the others are shown, not compared as equals."""
    why: str


def gateway_layers(layers: int, disparity_target: float = 0.0) -> tuple[int, ...]:
    """Return the seeds' rule at any depth: the first and last layer, below a target of 0.7 also the one at 75 % depth.

    Args:
        layers: how many the model has.
        disparity_target: the largest disparity to accept.

    Raises:
        ConfigError: no layers.
    """
    if layers < 1:
        raise ConfigError(f"{layers} layers: a model has at least one")
    inner = {int(GATEWAY_DEPTH * layers)} if disparity_target < GATEWAY_TARGET else set()
    return tuple(sorted({0, layers - 1} | inner))


def controls_for(
    plan: Mapping[str, Precision],
    costs: Costs,
    *,
    plan_bytes: int | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    random_plans: int = RANDOM_PLANS,
    seed: int = 0,
) -> tuple[Control, ...]:
    """Return all controls for a plan: random sets, patterns of depth, the highest scores, and more bits for all.

    Args:
        plan: unit → precision; the units it does not name are on the grid.
        costs: of whole layers in forward order, `layers.0` first.
        plan_bytes: bytes of the plan, where it names units that `costs` does not have; None = `costs.total(plan)`.
        scores: name → one score per layer, high = protect first (kurtosis, variance, magnitude, gradient, …).
        random_plans: how many random sets.
        seed: of the random sets.

    Raises:
        ConfigError: scores that are not one finite number per layer, or a plan without known bytes.
    """
    target = costs.total(plan) if plan_bytes is None else plan_bytes
    return (
        *random_controls(costs, target, count=random_plans, seed=seed, exclude=plan),
        *pattern_controls(costs, target),
        *(scored_control(name, values, costs, target) for name, values in (scores or {}).items()),
        *uniform_controls(costs, target),
    )


def random_controls(
    costs: Costs,
    target: int,
    *,
    count: int = RANDOM_PLANS,
    seed: int = 0,
    exclude: Mapping[str, Precision] | None = None,
) -> tuple[Control, ...]:
    """Return distinct random sets of units in 16 bit that all match the target.

    A set is drawn by going through the units in random order and taking each that still fits; it counts where its
    bytes match. With units of one size every set of the right number is equally likely. Fewer than `count` come back
    where there are not as many.

    Args:
        costs: of any units, layers or fusion groups.
        target: bytes of the plan to match.
        count: how many sets.
        seed: of the drawing.
        exclude: a plan that must not be among them.
    """
    extra = [options["fp16"] - options[costs.quantized] for options in costs.bytes_.values()]
    room = target - costs.total({})
    draw = np.random.default_rng(seed)
    seen = {frozenset(unit for unit, kind in (exclude or {}).items() if kind != costs.quantized)}
    controls: list[Control] = []
    for _ in range(TRIES_PER_PLAN * count):
        if len(controls) == count:
            break
        members, spent = [], 0
        for place in draw.permutation(len(extra)).tolist():
            if spent + extra[place] <= room + costs.tolerance:
                members.append(place)
                spent += extra[place]
        names = frozenset(costs.units[place] for place in members)
        if members and abs(spent - room) <= costs.tolerance and names not in seen:
            seen.add(names)
            controls.append(_control(f"random {len(controls)}", sorted(members), "fp16", costs, target, f"seed {seed}"))
    return tuple(controls)


def pattern_controls(costs: Costs, target: int) -> tuple[Control, ...]:
    """Return sets that depend on depth alone, at the target's bytes."""
    n = len(costs.units)
    middle = (n + 1) // 2
    ends = [place for pair in zip(range(n), reversed(range(n)), strict=True) for place in pair]
    anchors = gateway_layers(n)
    order = sorted({0, n - 1}) + [place for place in anchors if place not in (0, n - 1)]
    order += sorted(set(range(n)) - set(order), key=lambda i: (min(abs(i - a) for a in anchors), i))
    eighth = max(1, n // 8)
    families: dict[str, tuple[Sets, str]] = {
        "first": (_prefix(range(n)), "layers from the front"),
        "last": (_prefix(range(n - 1, -1, -1)), "layers from the back"),
        "ends": (_prefix(list(dict.fromkeys(ends))), f"from both ends inward; an eighth of each is {eighth}"),
        "gateway": (_prefix(order), f"the seeds' rule {set(anchors)}, cut or widened around these to equal bytes"),
        "even": (_spread(range(0, n, 2)), "spread over the even layers"),
        "odd": (_spread(range(1, n, 2)), "spread over the odd layers"),
        "first half": (_spread(range(middle)), "spread over the first half"),
        "second half": (_spread(range(middle, n)), "spread over the second half"),
    }
    return tuple(_nearest(name, sets, n, "fp16", costs, target, why) for name, (sets, why) in families.items())


def scored_control(name: str, scores: Sequence[float], costs: Costs, target: int) -> Control:
    """Return the units with the highest scores in 16 bit, at the target's bytes.

    Args:
        name: what the scores are.
        scores: one per unit in forward order, high = protect first; of equals the earlier one comes first.
        costs: of the units.
        target: bytes of the plan to match.

    Raises:
        ConfigError: not one finite number per unit.
    """
    n = len(costs.units)
    if len(scores) != n or not np.isfinite(scores).all():
        raise ConfigError(f"{name}: {len(scores)} scores for {n} units; give one finite number for each")
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()
    return _nearest(name, _prefix(order), n, "fp16", costs, target, f"highest {name} first")


def uniform_controls(costs: Costs, target: int) -> tuple[Control, ...]:
    """Return more bits for all units (at their own bytes), and for as many, evenly spread, as the target's bytes pay.

    Where they pay for all, the two are one.
    """
    between = {kind for options in costs.bytes_.values() for kind in options} - {"fp16"}
    between = {kind for kind in between if all(kind in options for options in costs.bytes_.values())}
    grid, n = precision_order(costs.quantized), len(costs.units)
    controls = []
    for kind in sorted((kind for kind in between if precision_order(kind) > grid), key=precision_order):
        controls.append(_control(f"uniform {kind}", range(n), kind, costs, target, f"all units in {kind}"))
        why = f"{kind} instead of {costs.quantized} for evenly spread units"
        spread = _nearest(f"spread {kind}", _spread(range(n)), n, kind, costs, target, why)
        if len(spread.precisions) < n:
            controls.append(spread)
    return tuple(controls)


def _prefix(order: Sequence[int]) -> Sets:
    return lambda count: sorted(order[:count])


def _spread(members: Sequence[int]) -> Sets:
    """Return sets of as many members as there are to be (or all), in the middles of equal stretches."""

    def middles(count: int) -> list[int]:
        taken = min(count, len(members))
        return [members[(2 * i + 1) * len(members) // (2 * taken)] for i in range(taken)]

    return middles


def _nearest(name: str, sets: Sets, most: int, kind: Precision, costs: Costs, target: int, why: str) -> Control:
    """Return the member of a family with the bytes nearest to the target, the smaller of equals."""
    options = [_control(name, sets(count), kind, costs, target, why) for count in range(most + 1)]
    return min(options, key=lambda control: (abs(control.difference), control.bytes_))


def _control(name: str, places: Sequence[int], kind: Precision, costs: Costs, target: int, why: str) -> Control:
    precisions: dict[str, Precision] = {costs.units[place]: kind for place in places}
    total = costs.total(precisions)
    difference = total - target
    matched = abs(difference) <= costs.tolerance
    off = "" if not difference else f"; {abs(difference)} bytes {'more' if difference > 0 else 'fewer'} than the plan"
    limit = "" if matched else f", beyond half of the smallest unit ({costs.tolerance:.0f})"
    return Control(
        name=name, precisions=precisions, bytes_=total, difference=difference, matched=matched, why=why + off + limit
    )
