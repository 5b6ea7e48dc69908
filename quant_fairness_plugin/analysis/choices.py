"""Does the quantized model still choose what is right? Agreement and tasks, by language and group, questions paired.

A model chooses the option with the lowest negative log-likelihood of the whole text; two that tie are no right choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest

from quant_fairness_plugin.analysis.lm_eval import read_pair
from quant_fairness_plugin.analysis.quantized import quantized_state
from quant_fairness_plugin.analysis.questions import Question, exchanged, read_questions
from quant_fairness_plugin.analysis.request import Request
from quant_fairness_plugin.artifacts import Bootstrap, Interval, Number, Part, TextSet, Undefined
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.intervals import (
    Resamples,
    benjamini_hochberg,
    interval,
    minimum_detectable,
    ratio_interval,
    weighted_sums,
)
from quant_fairness_plugin.measure.metrics import Array, significant
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.plan_set import BASELINE

PART: Part = "search"
"""Of the text set, where questions are made of it."""
ALL = "all"
"""The group of all questions of a language."""
Outcomes = Mapping[str, tuple[bool, ...]]
"""State → whether each question was answered rightly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow:
    """The questions of one language and group. Shares are of questions."""

    language: str
    group: str
    questions: int
    chance: float
    """What guessing gets right."""
    before: Interval
    after: Interval
    drop: Interval
    """Before minus after."""
    drop_ratio: Number
    """The drop over the reference language's in the same group, questions resampled apart."""
    lost: int
    """Right before and wrong after."""
    won: int
    adjusted_p: float
    """Exact McNemar test of lost against won, Benjamini-Hochberg adjusted over all rows."""
    detectable: float
    """The drop that so many questions would show with 80 % power."""
    above_chance: bool
    """Whether the 16-bit model is clearly better than guessing; if not, there is nothing to lose."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The answer of `analyze choices`."""

    state: str
    rows: tuple[ChoiceRow, ...]
    answers: dict[str, dict[str, tuple[bool, ...]]]
    """Language → state → right or wrong, in the order of the file."""


def analyse(request: Request) -> Choices:
    """Answer every question with both models.

    Raises:
        ConfigError: questions and logs were given, or a group of a single question.
        ArtifactError: a file that holds no questions.
    """
    logs = request.options.lm_eval_samples
    path = request.options.questions
    if path is not None and logs is not None:
        raise ConfigError("analyze choices takes --questions or --lm-eval-samples, not both; leave one out")
    if logs is not None:
        return of_logs(*logs, request)
    seed = request.config.seed
    questions = read_questions(path) if path is not None else exchanged(request.texts.part(PART), seed)
    by_language: dict[str, list[Question]] = {}
    for question in questions:
        by_language.setdefault(question.language, []).append(question)
    wanted = {name: rows for name, rows in by_language.items() if name in request.texts.languages}
    if not wanted:
        raise ConfigError(f"the questions are in {', '.join(by_language)}, and none of these is in --langs; name one")
    check_groups(wanted)
    loaded = request.load()
    state = quantized_state(loaded, request.config.fitted(loaded).grid, request.options.checkpoint)
    answers: dict[str, Outcomes] = {}
    for done, (name, rows) in enumerate(wanted.items()):
        answers[name] = answer(loaded, state, rows)
        if request.progress is not None:
            request.progress(done + 1, len(wanted))
    compared = compare(wanted, answers, state.name, request.config.bootstrap)
    return Choices(state.name, compared, {name: dict(right) for name, right in answers.items()})


def of_logs(before: Path, after: Path, request: Request) -> Choices:
    """Return the same figures for the answers that two logs of lm-eval hold; no model is run."""
    questions, right = read_pair(before, after, request.texts.languages)
    check_groups(questions)
    state = after.name
    answers = {name: {BASELINE: first, state: second} for name, (first, second) in right.items()}
    return Choices(state, compare(questions, answers, state, request.config.bootstrap), answers)


def check_groups(questions: Mapping[str, Sequence[Question]]) -> None:
    """Refuse groups that cannot be resampled.

    Raises:
        ConfigError: a group of a single question; names it.
    """
    counts = Counter((row.language, row.group) for rows in questions.values() for row in rows)
    if alone := [key for key, count in counts.items() if count < 2]:
        language, group = alone[0]
        raise ConfigError(f"group {group!r} has 1 question in {language}; give at least 2, or join it with another")


def answer(loaded: LoadedModel, state: ModelState, questions: Sequence[Question]) -> dict[str, tuple[bool, ...]]:
    """Return state → whether each question of one language was answered rightly."""
    options = tuple(option for question in questions for option in question.options)
    language = questions[0].language
    parts = tuple[Part, ...]("all" for _ in options)
    texts = TextSet(
        name="options",
        sentences={language: options},
        ids=tuple(map(str, range(len(options)))),
        parts=parts,
        registers=("",) * len(options),
        parallel=False,
        sha256="",
    )
    scores = score_states([fixed_state(BASELINE, loaded.model), state], loaded.tokenizer, texts)
    return {name: tuple(_is_right(questions, scored.languages[language].nll_nats)) for name, scored in scores.items()}


def compare(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Outcomes], state: str, bootstrap: Bootstrap
) -> tuple[ChoiceRow, ...]:
    """Return a row for every language and group, and for each language as a whole."""
    cells: dict[tuple[str, str], tuple[Array, Array]] = {}
    for language, rows in questions.items():
        right = np.array([answers[language][name] for name in (BASELINE, state)], dtype=np.float64)
        chance = np.array([1 / len(row.options) for row in rows])
        for group in (ALL, *dict.fromkeys(row.group for row in rows)):
            places = [i for i, row in enumerate(rows) if group in (ALL, row.group)]
            cells[language, group] = np.vstack([right, chance[None]])[:, places], _drops(right[:, places], bootstrap)
    tests = {key: mcnemar(*_changes(right)) for key, (right, _) in cells.items()}
    adjusted = dict(zip(tests, benjamini_hochberg(list(tests.values())), strict=True))
    return tuple(_row(key, right, series, cells, adjusted[key], bootstrap) for key, (right, series) in cells.items())


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided p-value of losing and winning being equally likely; 1 where nothing changed."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def _is_right(questions: Sequence[Question], nll: Sequence[float]) -> list[bool]:
    right, start = [], 0
    for question in questions:
        losses = nll[start : start + len(question.options)]
        start += len(question.options)
        others = [value for place, value in enumerate(losses) if place != question.answer]
        right.append(losses[question.answer] < min(others))
    return right


def _changes(right: Array) -> tuple[int, int]:
    before, after = right[0] > 0, right[1] > 0
    return int((before & ~after).sum()), int((~before & after).sum())


def _drops(right: Array, bootstrap: Bootstrap) -> Array:
    """Shares right before and after, and the drop, under every resample: `[1 + draws, 3]`."""
    columns = np.vstack([right, right[:1] - right[1:]]).T
    shares: Array = weighted_sums(Resamples.of(bootstrap, len(columns)).weights, columns.copy()) / len(columns)
    return shares


def _row(
    key: tuple[str, str],
    right: Array,
    series: Array,
    cells: Mapping[tuple[str, str], tuple[Array, Array]],
    adjusted_p: float,
    bootstrap: Bootstrap,
) -> ChoiceRow:
    (language, group), (lost, won), chance = key, _changes(right), float(right[2].mean())
    before = interval(series[:, 0])
    return ChoiceRow(
        language=language,
        group=group,
        questions=right.shape[1],
        chance=significant(chance),
        before=before,
        after=interval(series[:, 1]),
        drop=interval(series[:, 2]),
        drop_ratio=_ratio(series[:, 2], cells.get((bootstrap.reference or "", group)), bootstrap),
        lost=lost,
        won=won,
        adjusted_p=significant(adjusted_p),
        detectable=significant(float(minimum_detectable(series[1:, 2:])[0])),
        above_chance=before.low > chance,
    )


def _ratio(drop: Array, reference: tuple[Array, Array] | None, bootstrap: Bootstrap) -> Number:
    if reference is None:
        return Undefined(f"the reference language {bootstrap.reference} has no such questions")
    return ratio_interval(drop, reference[1][:, 2], what=f"the drop of {bootstrap.reference}")
