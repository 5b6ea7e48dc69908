"""The answer in words: may this checkpoint be shipped to the speakers of these languages?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from quant_fairness_plugin.artifacts import (
    Answers,
    Fault,
    Interval,
    LanguageAnswers,
    LanguageDamage,
    Measurement,
    Undefined,
)
from quant_fairness_plugin.artifacts.gates import Gate

Decision = Literal["SHIP", "SHIP WITH CARE", "DO NOT SHIP", "CANNOT TELL"]
_AS_VERB: dict[Fault, str] = {
    "empty": "is empty in",
    "repeats itself": "repeats itself in",
    "other script": "is in another script in",
}
_MOST_SENTENCES = 100
"""Beyond so many times the sentences, no number of them is a sensible advice."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision with its reason."""

    decision: Decision
    reason: str

    def __str__(self) -> str:
        return f"{self.decision}: {self.reason}"


def judge(measurement: Measurement, gate: Gate | None = None) -> Verdict:
    """Return whether a checkpoint can be shipped, by its damage to the languages that the 16-bit model knows.

    A collapsed language forbids it, and so does a gate that is exceeded beyond doubt; without a gate, the bound of
    `Gate()` separates `SHIP` from `SHIP WITH CARE`. Where an interval holds the bound, the sentences cannot tell.

    Answers to prompts can only make it worse: a language in which all are faulty, and none of the 16-bit model's,
    forbids it; a fault that no answer of the 16-bit model in the language has turns `SHIP` into `SHIP WITH CARE`.

    Args:
        measurement: of the checkpoint.
        gate: what the user accepts; None where nothing was said.
    """
    collapsed = [row.language for row in measurement.languages if row.status == "collapsed"]
    if collapsed:
        return Verdict("DO NOT SHIP", f"collapsed: {', '.join(collapsed)}")
    rows = [row for row in measurement.languages if row.status == "supported"]
    if not rows:
        return Verdict("CANNOT TELL", "the 16-bit model knows none of these languages, so there is nothing to lose")
    bound = gate or Gate()
    if bound.objective == "mean":
        verdict = _judge_mean(measurement, rows, bound, stated=gate is not None)
    else:
        verdict = _judge_worst(measurement, rows, bound, stated=gate is not None)
    if not measurement.held_out:
        verdict = Verdict(verdict.decision, f"{verdict.reason}{_condition(measurement)}")
    return _with_answers(verdict, measurement.answers)


def _with_answers(verdict: Verdict, answers: Answers | Undefined | None) -> Verdict:
    if not isinstance(answers, Answers):
        return verdict
    broken = [row for row in answers.languages if row.broken]
    if broken:
        said = "; ".join(f"{row.language}: {_new_faults(row)}" for row in broken)
        return Verdict("DO NOT SHIP", f"every answer is faulty in {said}. Besides, {verdict.reason}")
    new = [row for row in answers.languages if row.new_faults]
    if not new:
        return verdict
    said = "; ".join(f"{row.language} {_new_faults(row)}" for row in new)
    decision: Decision = "SHIP WITH CARE" if verdict.decision == "SHIP" else verdict.decision
    return Verdict(decision, f"{verdict.reason}; answers: {said}, the 16-bit model none")


def _new_faults(row: LanguageAnswers) -> str:
    """Return `repeats itself in 2 of 3`."""
    return ", ".join(f"{_AS_VERB[fault]} {row.counts(fault)[1]} of {len(row.answers)}" for fault in row.new_faults)


def _condition(measurement: Measurement) -> str:
    known = "were also used to make it" if measurement.held_out is False else "may have been used to make it"
    return f" (on sentences that {known})"


def _judge_worst(measurement: Measurement, rows: list[LanguageDamage], bound: Gate, *, stated: bool) -> Verdict:
    worst = max(rows, key=lambda row: row.kl_bits_per_byte.estimate)
    above = [row for row in rows if row.kl_bits_per_byte.low > bound.most]
    if above:
        decision: Decision = "DO NOT SHIP" if stated else "SHIP WITH CARE"
        count = f"{len(above)} of {len(rows)} languages lose more than {bound.most:g} bits per byte"
        return Verdict(decision, f"{count}; most {_loss(worst)}{_times_reference(measurement, worst)}")
    unsure = [row for row in rows if row.kl_bits_per_byte.high > bound.most]
    if unsure:
        row = max(unsure, key=lambda row: row.kl_bits_per_byte.estimate)
        return _cannot_tell(row.language, row.kl_bits_per_byte, row.sentences, bound)
    return Verdict("SHIP", f"no language loses more than {bound.most:g} bits per byte; most {_loss(worst)}")


def _judge_mean(measurement: Measurement, rows: list[LanguageDamage], bound: Gate, *, stated: bool) -> Verdict:
    mean = measurement.mean_kl
    if not isinstance(mean, Interval):
        return Verdict("CANNOT TELL", mean.undefined)
    if mean.low <= bound.most < mean.high:
        return _cannot_tell("the mean", mean, min(row.sentences for row in rows), bound)
    text = f"languages lose {mean.estimate:.3f} bits per byte in the mean, the bound is {bound.most:g}"
    if mean.high <= bound.most:
        return Verdict("SHIP", text)
    return Verdict("DO NOT SHIP" if stated else "SHIP WITH CARE", text)


def _loss(row: LanguageDamage) -> str:
    return f"{row.language}, {row.kl_bits_per_byte.estimate:.3f}"


def _times_reference(measurement: Measurement, row: LanguageDamage) -> str:
    """Return `, 3.1 × en`; nothing where the reference is the language itself, is not measured or loses nothing."""
    reference = next((other for other in measurement.languages if other.language == measurement.reference), None)
    if reference is None or reference is row or reference.status != "supported":
        return ""
    if reference.kl_bits_per_byte.low <= 0:
        return ""
    ratio = row.kl_bits_per_byte.estimate / reference.kl_bits_per_byte.estimate
    return f", {ratio:.1f} × {reference.language}"


def _cannot_tell(subject: str, loss: Interval, sentences: int, bound: Gate) -> Verdict:
    measured = f"{subject} loses {loss.low:.3f} to {loss.high:.3f} bits per byte"
    more = more_sentences(loss, sentences, bound.most)
    return Verdict("CANNOT TELL", f"{measured}, on both sides of {bound.most:g}, by {sentences} sentences; {more}")


def more_sentences(loss: Interval, sentences: int, bound: float) -> str:
    """Return how many sentences would separate a loss from a bound: an interval narrows with their square root."""
    distance = abs(loss.estimate - bound)
    width = max(loss.high - loss.estimate, loss.estimate - loss.low)
    factor = math.inf if distance == 0 else (width / distance) ** 2
    return f"use about {_rounded_up(sentences * factor)}" if factor <= _MOST_SENTENCES else "choose another bound"


def _rounded_up(count: float) -> int:
    """Return a count rounded up to two digits."""
    unit: int = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return math.ceil(round(count / unit, 6)) * unit  # 4.0000001 is 4
