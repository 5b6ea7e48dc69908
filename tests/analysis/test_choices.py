"""Questions whose answers are planted: what is lost, what is won, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from quant_fairness_plugin.analysis.choices import BASELINE, Choices, analyse, answer, compare, mcnemar
from quant_fairness_plugin.analysis.quantized import rounded_state
from quant_fairness_plugin.analysis.questions import EXCHANGED, Question, exchanged, read_questions
from quant_fairness_plugin.artifacts import Bootstrap, Grid, Interval, Undefined
from quant_fairness_plugin.errors import ArtifactError, ConfigError
from quant_fairness_plugin.measure.scoring import fixed_state
from quant_fairness_plugin.model.load import LoadedModel
from tests.analysis.samples import request_of
from tests.measure.samples import make_texts, numbered_texts

BOOTSTRAP = Bootstrap(draws=400)
PAIRS = (("cedar lamp", "cedar lqmp"), ("stone", "stine"), ("river bread", "rivrr bread"), ("window", "windew"))


def pairs(language: str, group: str, count: int) -> list[Question]:
    return [Question(language, group, (f"good {i}", f"bad {i}"), 0) for i in range(count)]


def test_planted_losses_come_out() -> None:
    questions = {"en": pairs("en", "near", 40), "he": pairs("he", "near", 40) + pairs("he", "far", 40)}
    right, wrong = (True,) * 40, (False,) * 40
    en = {BASELINE: right, "rtn": (False,) * 4 + (True,) * 36}
    he = {BASELINE: right + right, "rtn": (False,) * 4 + (True,) * 36 + (False,) * 20 + (True,) * 20}
    rows = {(row.language, row.group): row for row in compare(questions, {"en": en, "he": he}, "rtn", BOOTSTRAP)}
    assert list(rows) == [("en", "all"), ("en", "near"), ("he", "all"), ("he", "near"), ("he", "far")]
    far = rows["he", "far"]
    assert (far.lost, far.won, far.drop.estimate, far.chance) == (20, 0, 0.5, 0.5)
    assert far.above_chance
    assert far.adjusted_p < 0.01
    assert 0.1 < far.detectable < far.drop.estimate
    assert isinstance(far.drop_ratio, Undefined)  # English has no such questions
    assert rows["he", "all"].drop.estimate == 0.3
    same = compare({"en": pairs("en", "near", 40)}, {"en": {BASELINE: wrong, "rtn": wrong}}, "rtn", BOOTSTRAP)[0]
    assert (same.drop, same.adjusted_p, same.above_chance) == (Interval(0, 0, 0), 1.0, False)


def test_the_exact_test_adds_up_both_tails() -> None:
    assert mcnemar(0, 0) == 1.0
    for lost, won in ((5, 0), (9, 2), (3, 3)):
        tail = sum(binom.pmf(k, lost + won, 0.5) for k in range(min(lost, won) + 1))
        assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail))


def test_the_chosen_option_is_the_likelier_text(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama", layers=2)
    questions = [Question("en", "spelling", pair, 0) for pair in PAIRS]

    def nll(text: str) -> float:
        ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))

    expected = tuple(nll(good) < nll(bad) for good, bad in PAIRS)
    state = rounded_state(loaded, Grid(bits=2, group_size=32))
    found = answer(loaded, state, questions)
    assert found[BASELINE] == expected
    with state.applied():
        assert found[state.name] == tuple(nll(good) < nll(bad) for good, bad in PAIRS)
    reverse = [replace(question, answer=1) for question in questions]
    assert answer(loaded, fixed_state("same", loaded.model), reverse)["same"] == tuple(not one for one in expected)


def test_questions_are_asked_from_a_file(load: Callable[..., LoadedModel], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"language": "eng", "group": "spelling", "options": list(pair), "answer": 0} for pair in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = analyse(request_of(load("llama", layers=2), options={"questions": path}))
    assert isinstance(result, Choices)
    assert [(row.language, row.group, row.questions) for row in result.rows] == [
        ("en", "all", 4),
        ("en", "spelling", 4),
    ]
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'spelling' has 1 question in en"):
        analyse(request_of(load("llama", layers=2), options={"questions": path}))
    with pytest.raises(ConfigError, match="not both"):
        analyse(request_of(load("llama", layers=2), options={"questions": path, "lm_eval_samples": (path, path)}))


def test_without_a_file_sentences_are_asked_against_themselves_with_two_words_exchanged() -> None:
    texts = numbered_texts(6)
    made = exchanged(texts, 0)
    assert made == exchanged(texts, 0) != exchanged(texts, 1)
    assert [question.options[question.answer] for question in made] == [
        sentence for sentences in texts.sentences.values() for sentence in sentences
    ]
    for question in made:
        right, wrong = (option.split() for option in question.options)
        first, second = (place for place, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
        assert (second, wrong[first], wrong[second]) == (first + 1, right[second], right[first])


def test_questions_of_the_text_set_are_answered(load: Callable[..., LoadedModel]) -> None:
    request = request_of(load("llama", layers=2))
    rows = [row for row in analyse(request).rows if row.group == EXCHANGED]
    asked = request.texts.part("search").sentences
    assert [(row.language, row.questions) for row in rows] == [(name, len(asked[name])) for name in asked]


def test_where_no_space_separates_two_characters_are_exchanged() -> None:
    (question,) = exchanged(make_texts({"zh": ["一二三四五"]}), 3)
    right, wrong = question.options
    assert (sorted(right), len(wrong)) == (sorted(wrong), 5)
    assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 2
    assert exchanged(make_texts({"zh": ["一一一"]}), 0) == ()  # nothing would change


def test_clams_is_read_by_folder(tmp_path: Path) -> None:
    (tmp_path / "he_evalset").mkdir()
    file = tmp_path / "he_evalset" / "simple_agrmt.txt"
    file.write_text("True\tהילד רץ\nFalse\tהילד רצים\n", encoding="utf-8")
    assert read_questions(tmp_path) == (Question("he", "simple_agrmt", ("הילד רץ", "הילד רצים"), 0),)
    file.write_text("False\tא\nTrue\tב\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 1: expected True"):
        read_questions(tmp_path)
    with pytest.raises(ArtifactError, match="no question"):
        read_questions(tmp_path / "he_evalset")


def test_multiblimp_is_read_by_its_two_columns(tmp_path: Path) -> None:
    path = tmp_path / "heb.tsv"
    path.write_text('phenomenon\tsen\twrong_sen\nSV-#\tהוא "רץ\tהוא רצים\n', encoding="utf-8")
    assert read_questions(path) == (Question("he", "SV-#", ('הוא "רץ', "הוא רצים"), 0),)
    path.write_text("sentence\tother\na\tb\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 2: no sen and wrong_sen"):
        read_questions(path)


@pytest.mark.parametrize(
    "change", [{"answer": 2}, {"answer": True}, {"options": ["a", "a"]}, {"options": ["a"]}, {"extra": 1}, {"group": 3}]
)
def test_a_line_that_is_no_question_is_named(change: dict[str, object], tmp_path: Path) -> None:
    good = {"language": "en", "group": "g", "options": ["a", "b"], "answer": 1}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match="line 2: no question"):
        read_questions(path)
