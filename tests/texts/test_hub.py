from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from quant_fairness_plugin.errors import ArtifactError, ConfigError, ExternalServiceError, MissingExtraError
from quant_fairness_plugin.texts import hub, load_texts

ROWS = [{"id": "a", "en": "One.", "de": "Eins."}, {"id": "b", "en": "Two.", "de": "Zwei."}]


class StackError(Exception):
    """Like httpx.ConnectError: not an OSError."""


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the module `datasets`, which tests do not install: records calls, returns or raises `answer`."""
    module = SimpleNamespace(answer=ROWS, calls=[])

    def load_dataset(name: str, split: str | None) -> Any:
        module.calls.append((name, split))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_column_per_language_is_read(library: SimpleNamespace) -> None:
    texts = load_texts("datasets:me/news:test")
    assert library.calls == [("me/news", "test")]
    assert texts.name == "datasets:me/news:test"
    assert texts.sentences == {"en": ("One.", "Two."), "de": ("Eins.", "Zwei.")}
    assert texts.ids == ("a", "b")


def test_a_translation_column_is_read(library: SimpleNamespace) -> None:
    library.answer = [{"id": "7", "translation": {"en": "One.", "de": "Eins."}}]
    assert load_texts("datasets:opus:test").sentences == {"en": ("One.",), "de": ("Eins.",)}


def test_a_split_may_be_a_slice(library: SimpleNamespace) -> None:
    load_texts("datasets:me/news:test[10:200]")
    assert library.calls == [("me/news", "test[10:200]")]


def test_a_single_split_needs_no_name(library: SimpleNamespace) -> None:
    library.answer = {"train": ROWS}
    assert len(load_texts("datasets:me/news")) == 2
    assert library.calls == [("me/news", None)]


def test_several_splits_are_never_chosen_silently(library: SimpleNamespace) -> None:
    library.answer = {"train": ROWS, "test": ROWS}
    with pytest.raises(ConfigError, match="has the splits train, test; choose one: datasets:me/news:<split>"):
        load_texts("datasets:me/news")


def test_a_dataset_without_a_name_is_refused(library: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="'datasets::test' names no dataset"):
        load_texts("datasets::test")
    assert library.calls == []


def test_a_whole_corpus_is_refused(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_ROWS", 1)
    with pytest.raises(ConfigError, match=r"2 rows; accepted are 1\. Take a slice: datasets:me/news:test\[:2000\]"):
        load_texts("datasets:me/news")


def test_an_empty_row_is_named(library: SimpleNamespace) -> None:
    library.answer = [ROWS[0], {"id": "b", "en": "", "de": "Zwei."}]
    with pytest.raises(ArtifactError, match="datasets:me/news:test row 1, en: the text is empty"):
        load_texts("datasets:me/news:test")


def test_a_missing_extra_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "quant-fairness\[datasets\]"'):
        load_texts("datasets:me/news:test")


@pytest.mark.parametrize(
    "failure",
    [FileNotFoundError("Dataset 'me/news' doesn't exist\nmore"), ConnectionError(), StackError("no route")],
)
def test_a_hub_failure_is_one_of_an_outside_service(library: SimpleNamespace, failure: Exception) -> None:
    library.answer = failure
    with pytest.raises(ExternalServiceError, match="could not be fetched .* then try again") as caught:
        load_texts("datasets:me/news:test")
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_a_usage_error(library: SimpleNamespace) -> None:
    library.answer = ValueError("Unknown split \"tset\". Should be one of ['test'].")
    with pytest.raises(ConfigError, match='Unknown split "tset"'):
        load_texts("datasets:me/news:tset")
