"""The verdict follows from intervals, bound and statuses, each case by itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import (
    Answer,
    Answers,
    Fault,
    Interval,
    LanguageAnswers,
    Measurement,
    Undefined,
)
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.cli.verdict import check_gate
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.statistics.verdict import judge
from tests.export.build import measurement


def measured(en: Interval, he: Interval, *, held_out: bool | None = True, mean: Interval | None = None) -> Measurement:
    """A measurement of 70 sentences in two supported languages with these KLs."""
    both = measurement()
    first, second = (
        replace(row, status="supported", reason="", sentences=70, kl_bits_per_byte=kl)
        for row, kl in zip(both.languages, (en, he), strict=True)
    )
    return replace(
        both, languages=(first, second), reference="en", held_out=held_out, mean_kl=mean or Undefined("none")
    )


LOW, MIDDLE, HIGH = Interval(0.02, 0.01, 0.03), Interval(0.06, 0.04, 0.08), Interval(0.12, 0.11, 0.13)


@pytest.mark.parametrize(
    ("he", "gate", "text"),
    [
        (LOW, None, "SHIP: no language loses more than 0.05 bits per byte; most en, 0.020"),
        (HIGH, None, "SHIP WITH CARE: 1 of 2 languages lose more than 0.05 bits per byte; most he, 0.120, 6.0 × en"),
        (HIGH, Gate(), "DO NOT SHIP: 1 of 2 languages lose more than 0.05 bits per byte; most he, 0.120, 6.0 × en"),
        (HIGH, Gate(most=0.13), "SHIP: no language loses more than 0.13 bits per byte; most he, 0.120"),
        # An interval of ± .02 must shrink to ± .01, which takes four times the sentences.
        (
            MIDDLE,
            None,
            "CANNOT TELL: he loses 0.040 to 0.080 bits per byte, on both sides of 0.05, by 70 sentences; use about 280",
        ),
    ],
)
def test_the_worst_language_decides(he: Interval, gate: Gate | None, text: str) -> None:
    assert str(judge(measured(LOW, he), gate)) == text


def test_one_language_beyond_doubt_outweighs_one_in_doubt() -> None:
    assert judge(measured(MIDDLE, HIGH)).decision == "SHIP WITH CARE"


def test_a_bound_that_is_the_estimate_itself_no_number_of_sentences_can_tell() -> None:
    assert judge(measured(LOW, MIDDLE), Gate(most=0.06)).reason.endswith("by 70 sentences; choose another bound")


@pytest.mark.parametrize(
    ("mean", "gate", "decision"),
    [
        (LOW, Gate("mean", 0.05), "SHIP"),
        (HIGH, Gate("mean", 0.05), "DO NOT SHIP"),
        (MIDDLE, Gate("mean", 0.05), "CANNOT TELL"),
        (None, Gate("mean", 0.05), "CANNOT TELL"),
    ],
)
def test_a_gate_on_the_mean_does_not_ask_the_worst(mean: Interval | None, gate: Gate, decision: str) -> None:
    assert judge(measured(LOW, HIGH, mean=mean), gate).decision == decision


def test_a_collapsed_language_forbids_it_whatever_the_gate() -> None:
    fine = measured(LOW, LOW)
    broken = replace(fine, languages=(fine.languages[0], replace(fine.languages[1], status="collapsed")))
    assert str(judge(broken, Gate(most=100))) == "DO NOT SHIP: collapsed: he"


def test_nothing_is_claimed_of_languages_that_the_model_does_not_know() -> None:
    fine = measured(LOW, LOW)
    unknown = replace(fine, languages=tuple(replace(row, status="unsupported") for row in fine.languages))
    assert judge(unknown).decision == "CANNOT TELL"


@pytest.mark.parametrize(("held_out", "words"), [(False, "were also used"), (None, "may have been used")])
def test_the_verdict_says_where_its_sentences_are_not_new(held_out: bool | None, words: str) -> None:
    assert words in judge(measured(LOW, LOW, held_out=held_out)).reason


@pytest.mark.parametrize(
    "text", ["worst", "worst=", "worst=0", "worst=-1", "worst=nan", "worst=inf", "excess=1", "0.05"]
)
def test_a_gate_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected worst or mean, and a bound on the KL"):
        Gate.parse(text)


def test_a_gate_is_read_as_it_is_written() -> None:
    assert [Gate.parse(str(gate)) for gate in (Gate(), Gate("mean", 0.125))] == [Gate(), Gate("mean", 0.125)]


def answered(**faults: tuple[Fault, ...]) -> Answers:
    """Hebrew answers with the checkpoint's faults of each; `before` are the 16-bit model's, the same in all."""
    before = faults.pop("before", ())
    answers = tuple(
        Answer(prompt="?", sixteen_bit="x", checkpoint="y", sixteen_bit_faults=before, checkpoint_faults=found)
        for found in faults.values()
    )
    return Answers(
        source="bundled",
        chat_template=False,
        new_tokens=32,
        dtype="float32",
        languages=(LanguageAnswers(language="he", answers=answers),),
    )


LOOP, EMPTY = ("repeats itself",), ("empty",)


@pytest.mark.parametrize(
    ("answers", "loss", "text"),
    [
        (answered(a=(), b=(), c=()), LOW, "SHIP: no language loses more than 0.05 bits per byte; most en, 0.020"),
        (answered(a=LOOP, b=LOOP, c=LOOP, before=LOOP), LOW, "SHIP: no language loses more than"),
        (
            answered(a=LOOP, b=(), c=LOOP),
            LOW,
            "SHIP WITH CARE: no language loses more than 0.05 bits per byte; most en, 0.020; answers: he repeats "
            "itself in 2 of 3, the 16-bit model none",
        ),
        (answered(a=LOOP, b=(), c=LOOP, before=LOOP), LOW, "SHIP: "),
        (answered(a=LOOP, b=EMPTY, c=(), before=LOOP), LOW, "SHIP WITH CARE: "),
        (answered(a=(), b=LOOP, c=()), MIDDLE, "CANNOT TELL: "),
        (
            answered(a=LOOP, b=EMPTY, c=LOOP),
            HIGH,
            "DO NOT SHIP: every answer is faulty in he: is empty in 1 of 3, repeats itself in 2 of 3. Besides, 1 of 2 "
            "languages lose more than 0.05 bits per byte",
        ),
        (answered(a=LOOP, b=LOOP), LOW, "SHIP WITH CARE: "),  # two answers are not all that it says
        (Undefined("--prompts none"), LOW, "SHIP: no language"),
    ],
)
def test_faulty_answers_make_it_worse_where_the_16_bit_model_has_none(
    answers: Answers | Undefined, loss: Interval, text: str
) -> None:
    judged = str(judge(replace(measured(LOW, loss), answers=answers)))
    assert judged == text if text.startswith("SHIP: no language loses more than 0.05") else judged.startswith(text)


@pytest.mark.parametrize(
    ("answers", "passes"), [(answered(a=LOOP, b=(), c=()), True), (answered(a=LOOP, b=LOOP, c=LOOP), False)]
)
def test_a_gate_is_failed_by_answers_only_where_a_language_says_nothing_else(answers: Answers, passes: bool) -> None:
    state = replace(measured(LOW, LOW), answers=answers)
    with nullcontext() if passes else pytest.raises(QualityGateError, match="every answer is faulty in he"):
        check_gate(state, FairConfig(gate="worst=0.05"))
