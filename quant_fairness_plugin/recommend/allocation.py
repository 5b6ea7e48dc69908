"""Which precision each unit gets under a budget, by integer programming, from numbers alone.

Takes numbers: what each unit costs in each precision and how much it is predicted to hurt each language. Returns an
`Allocation`, or `Infeasible` with the reason. The prediction adds up what single units do: it knows nothing of how they
act together, so that every solution stays `predicted` until the plan itself is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from quant_fairness_plugin.artifacts import Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import Array, kl_bits_per_byte, significant
from quant_fairness_plugin.measure.objectives import OBJECTIVES, additive_objectives, one_of
from quant_fairness_plugin.recommend.milp import Problem, Selection

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
    objective: str
    value: float
    """The predicted objective; lower is better."""
    damage: dict[str, float]
    """Predicted damage of each language that counts."""
    gap: float
    """How much better, as a share of `value`, the best may still be: 0 where nothing is, at most 1."""
    reason: str
    predicted: Literal[True] = True


@dataclass(frozen=True, slots=True)
class Infeasible:
    """Why no choice of precisions meets the budget or the target."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What bounds an allocation: exactly one of a budget, in bytes or relative, and a target."""

    max_bytes: int | None = None
    """Budget for the whole checkpoint."""
    max_overhead: float | None = None
    """Budget as extra bytes over the all-quantized checkpoint (0.2 = 20 %)."""
    target: float | None = None
    """The largest objective to accept."""
    languages: Mapping[str, float] = field(default_factory=dict)
    """Language → the largest damage to accept, beside the budget or target."""

    def budget(self, floor_bytes: int | None) -> int | None:
        """Return the budget in bytes; None where there is a target instead.

        Args:
            floor_bytes: bytes of the all-quantized checkpoint; needed by `max_overhead`.

        Raises:
            ConfigError: not exactly one of the three limits, or one out of range.
        """
        given = [name for name in ("max_bytes", "max_overhead", "target") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) or 'no limit'} given: give exactly one of max_bytes, max_overhead and target"
            )
        if floor_bytes is not None and floor_bytes <= 0:
            raise ConfigError(f"floor_bytes={floor_bytes}: the all-quantized checkpoint has at least one byte")
        if self.max_overhead is None:
            return self.max_bytes
        if floor_bytes is None:
            raise ConfigError("max_overhead is relative to the all-quantized checkpoint: give its size as floor_bytes")
        if not (math.isfinite(self.max_overhead) and self.max_overhead >= 0):
            raise ConfigError(f"max_overhead={self.max_overhead}: give a share of 0 or more (0.2 = 20 %)")
        return int(floor_bytes * (1 + Fraction(str(self.max_overhead))))


def allocate(
    bytes_: UnitBytes,
    damage: UnitDamage,
    limit: Limit,
    *,
    base: Mapping[str, float],
    other_bytes: int = 0,
    floor_bytes: int | None = None,
    objective: str = "worst",
    weights: Mapping[str, float] | None = None,
) -> Allocation | Infeasible:
    """Choose one precision per unit: the least damage within a budget, or the fewest bytes that reach a target.

    The predicted damage of a language is its base plus what every unit's choice adds. Among equally good allocations
    (`TIE`) the one with fewer bytes is taken, then the one with the lower weighted mean.

    Args:
        bytes_: what each unit costs in each of its precisions.
        damage: what each choice adds to each language's damage, for the same units and precisions. Over the 16-bit
            model with `quantize` states; over the all-quantized one (0 or negative) with `protect` states.
        limit: a budget, or a target.
        base: language → damage of the state over which `damage` counts. Only these languages count.
        other_bytes: bytes of everything without a choice.
        floor_bytes: bytes of the all-quantized checkpoint; needed by `max_overhead`.
        objective: one of `additive_objectives`.
        weights: language → importance, 1 for all where None; only their ratios matter. `worst` takes the maximum of
            weight × damage with the largest weight set to 1.

    Raises:
        ConfigError: not exactly one limit, or numbers that do not fit together.
    """
    max_bytes = limit.budget(floor_bytes)
    problem = _problem(bytes_, damage, base, objective, weights)
    problem = replace(problem, caps=_caps(problem.languages, limit.languages))
    if problem.capped and (reason := _out_of_reach(problem)):
        return Infeasible(reason)
    if max_bytes is None:
        assert limit.target is not None
        result = _within_target(problem, limit.target)
    else:
        result = _within_budget(problem, max_bytes, other_bytes)
    return result if isinstance(result, Infeasible) else _allocation(problem, *result, other_bytes, floor_bytes)


def _within_budget(problem: Problem, max_bytes: int, other_bytes: int) -> tuple[Selection, str] | Infeasible:
    least = problem.fewest_bytes + other_bytes
    if least > max_bytes:
        return Infeasible(
            f"the smallest allocation takes {least} bytes and the budget is {max_bytes}: raise it to {least}, or "
            "offer lower precisions"
        )
    room = max_bytes - other_bytes
    best = problem.solve("value", max_bytes=room)
    if best is None and problem.capped:
        small = problem.solve("bytes")
        advice = "" if small is None else f": raise it to {small.bytes_ + other_bytes}, or the limits of languages"
        return Infeasible(f"no allocation within {max_bytes} bytes is predicted to keep {_in_words(problem)}{advice}")
    best = best or problem.smallest
    settled = _settle_ties(problem, best, best.value + problem.tie)
    return settled, f"least {problem.objective} damage within {max_bytes} bytes"


def _within_target(problem: Problem, target: float) -> tuple[Selection, str] | Infeasible:
    """The smallest choice that reaches the target, then the best one of that size."""
    reaching, within = problem.solve("value"), target + problem.tie
    assert reaching is not None
    if reaching.value > within:
        return Infeasible(
            f"no allocation is predicted to bring the {problem.objective} damage below {reaching.value:.4g}"
            f"{_doubt(reaching)} and the target is {target:.4g}: raise it, or offer higher precisions"
        )
    small = problem.solve("bytes", max_value=within) or reaching
    best = problem.solve("value", max_bytes=small.bytes_) or small
    best = best if best.value <= within else small
    settled = _settle_ties(problem, replace(best, gap=max(best.gap, small.gap)), best.value + problem.tie)
    return settled, f"fewest bytes with {problem.objective} damage of at most {target:.4g}"


def _caps(languages: tuple[str, ...], limits: Mapping[str, float]) -> Array:
    """[languages], infinite where there is no limit."""
    if unknown := sorted(set(limits) - set(languages)):
        raise ConfigError(f"limits of {', '.join(unknown)}, which do not count; there are {', '.join(languages)}")
    for language, value in limits.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"limit {language}={value}: give the largest KL to accept, in bits per byte, above 0")
    return np.array([limits.get(language, math.inf) for language in languages])


def _out_of_reach(problem: Problem) -> str:
    """Why no allocation of any size keeps the limits of languages; empty where one does."""
    if problem.solve("value") is not None:
        return ""
    return f"no allocation is predicted to keep {_in_words(problem)}: raise the limits, or offer higher precisions"


def _in_words(problem: Problem) -> str:
    """The limits of languages: `he below 0.05`."""
    pairs = zip(problem.languages, problem.caps.tolist(), strict=True)
    return ", ".join(f"{language} below {cap:.4g}" for language, cap in pairs if math.isfinite(cap))


def weigh(damage: Mapping[str, float], objective: str, weights: Mapping[str, float] | None = None) -> float:
    """Return the objective of a damage per language, as `allocate` counts it.

    Args:
        damage: of each language that counts.
        objective: one of `additive_objectives`.
        weights: as in `allocate`.

    Raises:
        ConfigError: another objective, or weights that are not one number for each language.
    """
    rows = _rows(objective, _importance(tuple(damage), weights))
    return float((rows @ np.array(list(damage.values()))).max())


def _rows(objective: str, importance: Array) -> Array:
    """The objective as the largest row of a matrix times the damages, [rows, languages]."""
    record = OBJECTIVES.get(objective)
    if record is None or record.sums is None:
        raise ConfigError(f"objective {objective!r} cannot be allocated for; use {one_of(additive_objectives())}")
    return record.sums(importance)


def _settle_ties(problem: Problem, best: Selection, within: float) -> Selection:
    """Among choices as good as `best`: the fewest bytes, then the lowest mean. A worse one never replaces it."""
    if best.gap:
        return best  # ties below the gap mean nothing, and looking for them takes as long as the search itself
    settled = best
    # One row is a weighted mean itself, so that the mean decides nothing more.
    for minimise in ("bytes", "mean") if len(problem.rows) > 1 else ("bytes",):
        other = problem.solve(minimise, max_bytes=settled.bytes_, max_value=within)
        if other is not None and other.value <= within + problem.tie:
            settled = replace(other, gap=settled.gap)
    return settled


def _allocation(
    problem: Problem, selection: Selection, reason: str, other_bytes: int, floor_bytes: int | None
) -> Allocation:
    total = selection.bytes_ + other_bytes
    damage = problem.damage(selection.picked).tolist()
    return Allocation(
        units=dict(problem.cells[cell] for cell in selection.picked),
        bytes_=total,
        overhead=None if floor_bytes is None else round((total - floor_bytes) / floor_bytes, 6),
        objective=problem.objective,
        value=significant(selection.value),
        damage={language: significant(value) for language, value in zip(problem.languages, damage, strict=True)},
        gap=significant(selection.gap),
        reason=f"predicted from single units: {reason}{_doubt(selection)}",
    )


def _doubt(selection: Selection) -> str:
    return f" (the search ended with a gap of {selection.gap:.2%})" if selection.gap else ""


def _problem(
    bytes_: UnitBytes,
    damage: UnitDamage,
    base: Mapping[str, float],
    objective: str,
    weights: Mapping[str, float] | None,
) -> Problem:
    if not bytes_ or not base:
        raise ConfigError("nothing to allocate: give at least one unit and one language")
    # Sorted, so that the result does not depend on the order of the mappings.
    cells = tuple((unit, precision) for unit in sorted(bytes_) for precision in sorted(bytes_[unit]))
    languages = tuple(base)
    _check_cells(bytes_, damage, cells, languages)
    harm = np.array([[damage[unit][precision][language] for unit, precision in cells] for language in languages])
    start = np.array([base[language] for language in languages])
    if not (np.isfinite(harm).all() and np.isfinite(start).all()):
        raise ConfigError(
            "a damage is not finite: leave out what could not be measured (a collapsed state), or weigh 0"
        )
    importance = _importance(languages, weights)
    return Problem(
        cells=cells,
        languages=languages,
        sizes=tuple(int(bytes_[unit][precision]) for unit, precision in cells),
        harm=harm,
        base=start,
        rows=_rows(objective, importance),
        mean=importance / importance.sum(),
        objective=objective,
        caps=np.full(len(languages), math.inf),
    )


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
    given = np.array([weights[language] for language in languages], dtype=np.float64)
    if not np.isfinite(given).all() or (given < 0).any() or given.max() <= 0:
        raise ConfigError(f"weights {dict(weights)}: give numbers of 0 or more, not all 0")
    scaled: Array = given / given.max()
    return scaled


def predict_damage(
    scores: Mapping[str, StateScores],
    states: Mapping[str, Mapping[Precision, str]],
    languages: Sequence[str],
    *,
    over: str,
) -> tuple[dict[str, dict[Precision, dict[str, float]]], dict[str, float]]:
    """Return what each unit's choice adds to each language's KL (bits per byte), and the KL that it is added to.

    With `quantize` states, `over` is the 16-bit state and so is the state of `fp16`; with `protect` states, `over` is
    the all-quantized one and so is the state of the grid's precision.

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
