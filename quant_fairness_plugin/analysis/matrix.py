"""Calibration language × evaluation language: what a language loses when another one was calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from quant_fairness_plugin.analysis.outcomes import CalibrationOutcome, Judge, Scored
from quant_fairness_plugin.artifacts import Interval, Number, TextSet
from quant_fairness_plugin.measure.intervals import interval
from quant_fairness_plugin.quantize.calibration import CalibrationSet

SPREAD = "uniform, as many tokens as one language"
"""A row of the matrix: without it, a mixture of languages would differ from one language in its amount of text, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLanguage:
    """A language's KL (bits per byte) when calibrated on another text, minus that when calibrated on itself alone."""

    language: str
    from_others: Number
    """Mean over the other languages, each alone."""
    from_mixture: Number
    """All languages in equal parts, with as many tokens in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationMatrix:
    """Calibration language × evaluation language, without protection."""

    rows: tuple[CalibrationOutcome, ...]
    """Each language alone, then mixtures; columns are their `languages`."""
    own: tuple[OwnLanguage, ...]
    """Of the supported languages."""

    @property
    def verdict(self) -> str:
        """In how many languages a calibration on that language alone is the better one."""
        others, mixture = (_count([getattr(row, name) for row in self.own]) for name in ("from_others", "from_mixture"))
        return (
            f"of {len(self.own)} languages, calibrating on the language itself lowers its KL against another single "
            f"language in {others}, and against all languages with as many tokens in all in {mixture}"
        )


def single_language_sets(
    build: Callable[..., CalibrationSet], texts: TextSet, tokens_per_language: int | None
) -> dict[str, CalibrationSet]:
    """Return each language alone, all with the same number of tokens; and all languages with that number between them.

    Args:
        build: `build_calibration` with tokenizer and text set.
        texts: the text set.
        tokens_per_language: the number; as many as the smallest language has if None.
    """
    budget = tokens_per_language or min(build().coverage.values())
    singles = {name: build(languages=[name], tokens_per_language=budget) for name in texts.languages}
    return singles | {SPREAD: build(tokens_per_language=max(1, budget // len(texts.languages)))}


def calibration_matrix(
    judge: Judge,
    scored: Mapping[tuple[str, bool], Scored],
    singles: Mapping[str, CalibrationSet],
    names: Sequence[str],
) -> CalibrationMatrix:
    """Return the rows of all calibrations without protection, and each language against the others' text.

    Args:
        judge: what scored them.
        scored: (calibration, protected) → result; those without protection are read.
        singles: the sets of `single_language_sets`.
        names: the rows, in order.
    """
    alone = [name for name in singles if name != SPREAD]
    intact = [name for name in alone if all(scored[row, False].statuses[name] == "supported" for row in singles)]
    gains = []
    for name in intact:
        series = {row: judge.series(scored[row, False], [name]) for row in singles}
        others = [series[row] for row in alone if row != name]
        mean = sum(others[1:], start=others[0]) / len(others) if others else series[name]
        gains.append(
            OwnLanguage(
                language=name,
                from_others=interval(mean - series[name]),
                from_mixture=interval(series[SPREAD] - series[name]),
            )
        )
    rows = [replace(scored[name, False].outcome, calibration=name) for name in names]
    return CalibrationMatrix(rows=tuple(rows), own=tuple(gains))


def _count(changes: Sequence[Number]) -> str:
    """`9 (and raises it in 1)`: changes that are clearly above and below 0."""
    known = [change for change in changes if isinstance(change, Interval)]
    above, below = sum(change.low > 0 for change in known), sum(change.high < 0 for change in known)
    return f"{above} (and raises it in {below})"
