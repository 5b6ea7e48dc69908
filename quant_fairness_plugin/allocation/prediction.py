"""From the scores of states that differ in one unit to the tables that `allocate` takes. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quant_fairness_plugin.artifacts import Precision, StateScores
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import kl_bits_per_byte


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
