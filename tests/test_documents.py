"""JSON and YAML from elsewhere: bounded, each key once, and plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_fairness_plugin import documents
from quant_fairness_plugin.documents import MOST_DEPTH, first_repeated, parse_json, parse_yaml, read_text

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_plain_data_comes_back_as_the_library_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 1}', "'a' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), "nested deeper than 64 levels"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[NaN]", "nan is no number"),
        ("[1e999]", "inf is no number"),
        (f"[{10**400}]", "a whole number of 1329 bits"),
        (f"[{'9' * 5000}]", "."),
        ('["\\ud800"]', "lone surrogate U\\+D800"),
        ("{'a': 1}", "."),
    ],
)
def test_a_document_that_is_refused_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_configs_of_models_may_hold_infinities() -> None:
    assert parse_json('{"time_step_limit": [0.0, Infinity]}', finite=False) == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: no\nb: yes\nc: off\nd: true", {"a": "no", "b": "yes", "c": "off", "d": True}),
        ("a: 2020-01-02", {"a": "2020-01-02"}),
        ("2020-01-02: a", {"2020-01-02": "a"}),
        ("a: [1, 2.5, ~, x]", {"a": [1, 2.5, None, "x"]}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("", None),
    ],
)
def test_yaml_is_plain_data(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1", r"anchors and aliases \(x\) are not read"),
        ("a: *x", r"anchors and aliases \(x\) are not read"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("? [a]\n: 1", "a list names a value"),
        ("a: !!int ''", "."),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: .nan", "nan is no number"),
        ("a: " + "[" * 500 + "]" * 500, "nested deeper"),
        ("a: [", "while parsing"),
    ],
)
def test_yaml_that_is_refused_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opened", ["[", "{a: ", "- ", "? "])
def test_yaml_that_is_too_deep_is_left_where_it_is(opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every token PyYAML looks at all the brackets that are open: 325 of them took a second."""
    looked = 0
    plain = documents._Plain.stale_possible_simple_keys

    def look(loader: Any) -> None:
        nonlocal looked
        looked += 1
        plain(loader)

    def looks(times: int) -> int:
        nonlocal looked
        looked = 0
        with pytest.raises(ValueError, match="nested deeper"):
            parse_yaml(opened * times)
        return looked

    monkeypatch.setattr(documents._Plain, "stale_possible_simple_keys", look)
    assert looks(MOST_DEPTH + 2) == looks(4 * MOST_DEPTH) > 0


def test_a_file_is_read_up_to_its_bound_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * 7)
    assert read_text(path, most=10) == "x" * 7
    with pytest.raises(ValueError, match="larger than 9 bytes"):
        read_text(path, most=9)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(path)


def test_the_first_of_those_that_repeat() -> None:
    assert first_repeated("abcba") == "a"
    assert first_repeated("abc") is None
