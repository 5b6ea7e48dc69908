"""The table of damage fits 80 columns, and its marks and bars are those of the figures."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from quant_fairness_plugin.artifacts import Interval, Measurement
from quant_fairness_plugin.cli.damage import (
    BAR,
    bar,
    baseline_table,
    comparison_table,
    damage_notes,
    damage_table,
    detailed_damage_table,
)
from tests.export.build import measurement


def rows(**kl: float) -> Measurement:
    """A measurement with these KLs; `xx` is unsupported."""
    first = measurement().languages[0]
    languages = tuple(
        replace(
            first,
            language=name.replace("_", "-"),
            kl_bits_per_byte=Interval(value, value / 2, 2 * value),
            delta_bpb=Interval(value / 10, -value, value),
            status="unsupported" if name == "hi" else "supported",
            reason="no better than chance" if name == "hi" else "",
        )
        for name, value in kl.items()
    )
    return replace(measurement(), languages=languages)


def lines(table: Table, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined] # the StringIO above


@pytest.mark.parametrize("after", [{"en": 0.1, "zh_Hant": 0.2, "hi": 3.0, "sr_Latn": 12.0}])
def test_no_line_is_longer_than_80_columns_and_no_cell_is_cut(after: dict[str, float]) -> None:
    state = rows(**after)
    for table in (damage_table(state, title="t"), comparison_table(state, state, title="t")):
        assert lines(table) == [line[:80].ljust(len(line[:80])) for line in lines(table, width=200)]


def test_figures_are_thousandths_and_marked_where_the_interval_excludes_0() -> None:
    state = rows(en=0.1, he=0.2)
    certain = replace(state.languages[1], delta_bpb=Interval(0.05, 0.01, 0.09))
    english, hebrew = lines(damage_table(replace(state, languages=(state.languages[0], certain)), title="t"))[2:]
    assert english.split()[:5] == ["English", "en", "1.500", "10", "100"]
    assert hebrew.split()[:5] == ["Hebrew", "he", "1.500", "50*", "200"]


def test_what_does_not_count_comes_last_without_a_bar_and_its_reason_stands_below() -> None:
    state = rows(hi=3.0, en=0.1)
    *_, english, hindi = lines(damage_table(state, title="t"))
    assert "█" * BAR in english  # the longest bar is the worst supported language's
    assert hindi.split()[:2] == ["Hindi", "hi"]
    assert "unsupported" in hindi
    assert "█" not in hindi
    assert damage_notes(state)[1] == "hi: no better than chance"


def test_notes_say_how_texts_begin_and_a_title_that_nothing_was_held_out() -> None:
    state = rows(en=0.1)
    begun = replace(state, provenance=replace(state.provenance, start="chat"), held_out=False, condition="all used")
    assert damage_notes(begun)[1:] == [
        "Texts begin as the chat template begins a user's message; --start chooses", "all used",
    ]  # fmt: skip
    for table in (damage_table(begun, title="t"), comparison_table(begun, begun, title="t")):
        assert table.title is not None
        assert "NOT HELD OUT" in str(table.title)
    assert "NOT HELD OUT" not in str(damage_table(replace(state, held_out=True), title="t").title)


def test_a_reason_that_several_languages_share_but_for_its_figures_stands_once() -> None:
    state = rows(en=0.1, ar=1.0, hi=2.0, zh=3.0)
    reasons = {"ar": "needs 1.97 bits (1.95)", "hi": "needs 2.50 bits (2.41)", "zh": "something else"}
    languages = tuple(
        replace(row, status="unsupported", reason=reasons[row.language]) if row.language in reasons else row
        for row in state.languages
    )
    assert damage_notes(replace(state, languages=languages))[1:3] == [
        "ar, hi: needs 1.97 bits (1.95) (figures of ar; the others' are in --details)",
        "zh: something else",
    ]


def test_the_comparison_shows_what_is_left_and_what_went() -> None:
    before, after = rows(en=0.1, he=0.4), rows(en=0.1, he=0.1)
    english, hebrew = lines(comparison_table(before, after, title="t"))[2:4]
    assert (english.count("█"), english.count("░")) == (4, 0)
    assert (hebrew.count("█"), hebrew.count("░")) == (4, 12)


@pytest.mark.parametrize(("value", "longest", "drawn"), [(0, 1, ""), (1e-9, 1, "▏"), (1, 1, "█" * BAR), (1, 0, "")])
def test_bars_of_extremes(value: float, longest: float, drawn: str) -> None:
    assert bar(value, longest) == drawn


def test_bars_are_proportional() -> None:
    assert [bar(k, BAR) for k in range(1, BAR + 1)] == ["█" * k for k in range(1, BAR + 1)]


def test_details_have_every_interval_and_the_baseline_none() -> None:
    state = rows(en=0.1)
    assert "0.10000 [0.05000, 0.20000]" in "\n".join(lines(detailed_damage_table(state, title="t"), 200))
    assert "KL" not in "\n".join(lines(baseline_table(state, title="t")))
