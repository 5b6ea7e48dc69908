"""Step 5 of 8: which precision each unit gets under a budget, by integer programming. Needs no model and no torch.

Takes numbers: what each unit costs in each precision and how much it is predicted to hurt each language. Returns an
`Allocation`, or `Infeasible` with the reason. The prediction adds up what single units do: it knows nothing of how they
act together, so that every solution stays `predicted` until the plan itself is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

from quant_fairness_plugin.artifacts import Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array, kl_bits_per_byte, significant
from quant_fairness_plugin.recommend.milp import Found, Goal, Problem

UnitBytes = Mapping[str, Mapping[Precision, int]]
"""Unit → precision → bytes of the unit's weights, scales included."""
UnitDamage = Mapping[str, Mapping[Precision, Mapping[str, float]]]
"""Unit → precision → language → what this choice adds to the language's damage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One precision per unit, with what it costs and what it is predicted to do."""

    units: dict[str, Precision]
    bytes_: int
    """Of all tensors of the checkpoint."""
    overhead: float | None
    """Extra bytes over the all-quantized checkpoint, where its size was given."""
    objective: Goal
    value: float
    """The predicted objective; lower is better."""
    damage: dict[str, float]
    """Predicted damage of each language that counts."""
    gap: float
    """How much better, as a share of `value`, the best may still be: 0 where nothing is, at most 1."""
    reason: str
    predicted: Literal[True] = True

    @property
    def worst_language(self) -> str:
        """The language with the largest predicted damage, unweighted; the first of equals."""
        return max(self.damage, key=lambda language: self.damage[language])


@dataclass(frozen=True, slots=True)
class Infeasible:
    """Why no choice of precisions meets the budget or the target."""

    reason: str


def allocate(
    bytes_: UnitBytes,
    damage: UnitDamage,
    *,
    base: Mapping[str, float],
    other_bytes: int = 0,
    floor_bytes: int | None = None,
    max_bytes: int | None = None,
    max_overhead: float | None = None,
    target: float | None = None,
    objective: Goal = "worst",
    weights: Mapping[str, float] | None = None,
) -> Allocation | Infeasible:
    """Choose one precision per unit: the least damage within a budget, or the fewest bytes that reach a target.

    The predicted damage of a language is its base plus what every unit's choice adds. Among equally good allocations
    (`TIE`) the one with fewer bytes is taken, then the one with the lower weighted mean.

    Args:
        bytes_: what each unit costs in each of its precisions.
        damage: what each choice adds to each language's damage, for the same units and precisions. Over the 16-bit
            model with `quantize` states; over the all-quantized one (0 or negative) with `protect` states.
        base: language → damage of the state over which `damage` counts. Only these languages count.
        other_bytes: bytes of everything without a choice.
        floor_bytes: bytes of the all-quantized checkpoint; needed by `max_overhead`.
        max_bytes: budget for the whole checkpoint.
        max_overhead: budget as extra bytes over `floor_bytes` (0.2 = 20 %).
        target: the largest objective to accept.
        objective: the largest damage of a language, or the mean.
        weights: language → importance, 1 for all where None; only their ratios matter. `worst` takes the maximum of
            weight × damage with the largest weight set to 1.

    Raises:
        ConfigError: not exactly one of the three limits, or numbers that do not fit together.
    """
    limit = byte_limit(max_bytes, max_overhead, target, floor_bytes)
    problem = _problem(bytes_, damage, base, objective, weights)
    if limit is not None:
        found = _least_damage(problem, limit - other_bytes)
        if found is None:
            least = problem.fewest_bytes + other_bytes
            return Infeasible(
                f"the smallest allocation takes {least} bytes and the budget is {limit}: raise it to {least}, or "
                "offer lower precisions"
            )
        reason = f"least {objective} damage within {limit} bytes"
    else:
        assert target is not None
        best = problem.solve("value")
        assert best is not None
        if best.value > target + problem.tie:
            return Infeasible(
                f"no allocation is predicted to bring the {objective} damage below {best.value:.4g}{_doubt(best)} and "
                f"the target is {target:.4g}: raise it, or offer higher precisions"
            )
        found = _fewest_bytes(problem, target, best)
        reason = f"fewest bytes with {objective} damage of at most {target:.4g}"
    return _allocation(problem, found, other_bytes, floor_bytes, reason)


def weigh(damage: Mapping[str, float], objective: Goal, weights: Mapping[str, float] | None = None) -> float:
    """The objective of a damage per language, as `allocate` counts it.

    Args:
        damage: of each language that counts.
        objective: the largest damage of a language, or the mean.
        weights: as in `allocate`.

    Raises:
        ConfigError: weights that are not one number for each language.
    """
    importance = _importance(tuple(damage), weights)
    values = np.array(list(damage.values()))
    if objective == "mean":
        return float(importance @ values / importance.sum())
    return float((importance * values)[importance > 0].max())


def _least_damage(problem: Problem, max_bytes: int) -> Found | None:
    if problem.fewest_bytes > max_bytes:
        return None
    best = problem.solve("value", max_bytes=max_bytes) or problem.smallest
    return _settle_ties(problem, best, best.value + problem.tie)


def _fewest_bytes(problem: Problem, target: float, reaching: Found) -> Found:
    """The smallest choice that reaches the target, then the best one of that size."""
    within = target + problem.tie
    small = problem.solve("bytes", max_value=within) or reaching
    best = problem.solve("value", max_bytes=small.bytes_) or small
    best = best if best.value <= within else small
    return _settle_ties(problem, replace(best, gap=max(best.gap, small.gap)), best.value + problem.tie)


def _settle_ties(problem: Problem, best: Found, within: float) -> Found:
    """Among choices as good as `best`: the fewest bytes, then the lowest mean. A worse answer never replaces it."""
    found = best
    if best.gap:
        return best  # ties below the gap mean nothing, and looking for them takes as long as the search itself
    for minimise in ("bytes", "mean") if problem.objective == "worst" else ("bytes",):
        other = problem.solve(minimise, max_bytes=found.bytes_, max_value=within)
        if other is not None and other.value <= within + problem.tie:
            found = replace(other, gap=found.gap)
    return found


def _allocation(
    problem: Problem, found: Found | None, other_bytes: int, floor_bytes: int | None, reason: str
) -> Allocation:
    assert found is not None
    total = found.bytes_ + other_bytes
    damage = problem.damage(found.picked).tolist()
    return Allocation(
        units=dict(problem.cells[cell] for cell in found.picked),
        bytes_=total,
        overhead=None if floor_bytes is None else round((total - floor_bytes) / floor_bytes, 6),
        objective=problem.objective,
        value=significant(found.value),
        damage={language: significant(value) for language, value in zip(problem.languages, damage, strict=True)},
        gap=significant(found.gap),
        reason=f"predicted from single units: {reason}{_doubt(found)}",
    )


def _doubt(found: Found) -> str:
    return f" (the search ended with a gap of {found.gap:.2%})" if found.gap else ""


def byte_limit(
    max_bytes: int | None, max_overhead: float | None, target: float | None, floor_bytes: int | None
) -> int | None:
    """The budget in bytes; None where there is a target instead. Arguments as of `allocate`.

    Raises:
        ConfigError: not exactly one of the three limits, or one that is no limit.
    """
    given = [name for name, value in _limits(max_bytes, max_overhead, target).items() if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'no limit'} given: give exactly one of max_bytes, max_overhead and target"
        )
    if floor_bytes is not None and floor_bytes <= 0:
        raise ConfigError(f"floor_bytes={floor_bytes}: the all-quantized checkpoint has at least one byte")
    if max_overhead is None:
        return max_bytes
    if floor_bytes is None:
        raise ConfigError("max_overhead is relative to the all-quantized checkpoint: give its size as floor_bytes")
    if not (math.isfinite(max_overhead) and max_overhead >= 0):
        raise ConfigError(f"max_overhead={max_overhead}: give a share of 0 or more (0.2 = 20 %)")
    return int(floor_bytes * (1 + Fraction(str(max_overhead))))


def _limits(max_bytes: int | None, max_overhead: float | None, target: float | None) -> dict[str, float | None]:
    return {"max_bytes": max_bytes, "max_overhead": max_overhead, "target": target}


def _problem(
    bytes_: UnitBytes,
    damage: UnitDamage,
    base: Mapping[str, float],
    objective: Goal,
    weights: Mapping[str, float] | None,
) -> Problem:
    if objective not in get_args(Goal):
        raise ConfigError(f"objective {objective!r} cannot be allocated for; use worst or mean")
    if not bytes_ or not base:
        raise ConfigError("nothing to allocate: give at least one unit and one language")
    # Sorted, so that the answer does not depend on the order of the mappings.
    cells = tuple((unit, precision) for unit in sorted(bytes_) for precision in sorted(bytes_[unit]))
    languages = tuple(base)
    _check_cells(bytes_, damage, cells, languages)
    sizes = tuple(int(bytes_[unit][precision]) for unit, precision in cells)
    harm = np.array([[damage[unit][precision][language] for unit, precision in cells] for language in languages])
    start = np.array([base[language] for language in languages])
    if not (np.isfinite(harm).all() and np.isfinite(start).all()):
        raise ConfigError(
            "a damage is not finite: leave out what could not be measured (a collapsed state), or weigh 0"
        )
    importance = _importance(languages, weights)
    mean = importance / importance.sum()
    rows = np.diag(importance)[importance > 0] if objective == "worst" else mean[None]
    return Problem(cells, languages, sizes, harm, start, rows, mean, objective)


def _check_cells(
    bytes_: UnitBytes, damage: UnitDamage, cells: tuple[tuple[str, Precision], ...], languages: tuple[str, ...]
) -> None:
    for unit in sorted(set(bytes_) ^ set(damage)):
        raise ConfigError(
            f"unit {unit!r} has {'no damage' if unit in bytes_ else 'no bytes'}: give both for every unit"
        )
    for unit, options in bytes_.items():
        if not options or set(options) != set(damage[unit]):
            raise ConfigError(
                f"unit {unit!r} has bytes in {sorted(options)} and damage in {sorted(damage[unit])}: give the same "
                "precisions, at least one"
            )
    for unit, precision in cells:
        if bytes_[unit][precision] < 0:
            raise ConfigError(f"unit {unit!r} has {bytes_[unit][precision]} bytes in {precision}: give 0 or more")
        if lacking := [language for language in languages if language not in damage[unit][precision]]:
            raise ConfigError(
                f"unit {unit!r} in {precision} has no damage of {', '.join(lacking)}: give every language"
            )


def _importance(languages: tuple[str, ...], weights: Mapping[str, float] | None) -> Array:
    """[languages], the largest 1."""
    if weights is None:
        return np.ones(len(languages))
    if unknown := sorted(set(weights) - set(languages)):
        raise ConfigError(f"weights for {', '.join(unknown)}, which do not count; there are {', '.join(languages)}")
    if lacking := [language for language in languages if language not in weights]:
        raise ConfigError(f"no weight for {', '.join(lacking)}: give one for every language, 0 to leave it out")
    found = np.array([weights[language] for language in languages], dtype=np.float64)
    if not np.isfinite(found).all() or (found < 0).any() or found.max() <= 0:
        raise ConfigError(f"weights {dict(weights)}: give numbers of 0 or more, not all 0")
    scaled: Array = found / found.max()
    return scaled


def predict_damage(
    scores: Mapping[str, StateScores],
    states: Mapping[str, Mapping[Precision, str]],
    languages: Sequence[str],
    *,
    over: str,
) -> tuple[dict[str, dict[Precision, dict[str, float]]], dict[str, float]]:
    """What each unit's choice adds to each language's KL in bits per byte, and the KL of the state it is added to.

    With `quantize` states, `over` is the 16-bit state and so is the state of `fp16`; with `protect` states, `over` is
    the all-quantized one and so is the state of the grid's own precision.

    Args:
        scores: per-sentence scores by state.
        states: unit → precision → name of the state in which only this unit has this precision.
        languages: those that count.
        over: name of the state in which no unit is singled out.

    Returns:
        `damage` and `base` of `allocate`.

    Raises:
        ConfigError: a state or language without scores.
    """
    names = {over} | {name for options in states.values() for name in options.values()}
    harm = {name: _damage(scores, name, languages) for name in sorted(names)}
    base = harm[over]
    damage = {
        unit: {
            precision: {language: harm[name][language] - base[language] for language in languages}
            for precision, name in options.items()
        }
        for unit, options in states.items()
    }
    return damage, base


def _damage(scores: Mapping[str, StateScores], name: str, languages: Sequence[str]) -> dict[str, float]:
    if name not in scores:
        raise ConfigError(f"state {name!r} was not scored; there are {', '.join(scores)}")
    rows = scores[name].languages
    if lacking := [language for language in languages if language not in rows]:
        raise ConfigError(f"state {name!r} has no scores of {', '.join(lacking)}; it has {', '.join(rows)}")
    return {
        language: kl_bits_per_byte(float(sum(rows[language].kl_nats)), float(sum(rows[language].bytes_)))
        for language in languages
    }
