from __future__ import annotations

import io
from dataclasses import replace
from itertools import combinations

from rich.console import Console
from rich.table import Table

from quant_fairness_plugin.artifacts import Combinations, Grid, ProtectionPlan, SearchRecord, SweepReport
from quant_fairness_plugin.cli.tables import (
    SHOWN,
    combination_lines,
    fitting,
    necessity_lines,
    singled_out,
    sweep_table,
    synergy_tables,
)
from quant_fairness_plugin.statistics.synergy import EvaluatedSets
from tests.planted import planted_sets

GAIN = {f"layers.{i}": gain for i, gain in enumerate([0.1, 0.4, 1.5, 0.2, 1.2, 0.3])}


def report() -> SweepReport:
    """All pairs of six layers in 16 bit, and every layer in 8."""
    pairs: dict[tuple[str, ...], float] = {(a, b): GAIN[a] + GAIN[b] for a, b in combinations(GAIN, 2)}
    single: dict[tuple[str, ...], float] = {(unit,): gain for unit, gain in GAIN.items()}
    swept = planted_sets(single | pairs, others={"int8": GAIN}, noise=0.001)
    sets = EvaluatedSets.of(swept, draws=200)
    return replace(swept, interactions=sets.interactions(["protect-one"]), necessity=sets.necessity_tests([2]))


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above


def test_all_single_plans_are_shown_and_the_best_of_the_others() -> None:
    text = printed(sweep_table(report(), "worst"))
    assert all(f" protect {i} " in text for i in range(6))
    assert text.count("+") == SHOWN
    assert "protect 2+4" in text
    assert "protect 0+3" not in text
    assert text.count("int8 ") == SHOWN
    assert "int8 2" in text
    assert f"{15 - SHOWN + 6 - SHOWN} more plans are in --json" in text


def test_nothing_is_said_to_be_hidden_where_all_is_shown() -> None:
    few = planted_sets({("layers.0",): 1.0, ("layers.1",): 0.5}, noise=0.001)
    assert "more plans" not in printed(sweep_table(few, "worst"))


def test_coverage_and_the_best_set_are_one_line() -> None:
    single, pairs = combination_lines(report(), "worst")
    assert single == "single: 6 of 6 evaluated"
    assert pairs.startswith("pairs: 15 of 15 evaluated; best to protect: 2,4, 0.09")


def test_a_search_says_how_many_sets_of_how_many() -> None:
    counts = {2: Combinations(evaluated=5, possible=15), 3: Combinations(evaluated=4, possible=20)}
    record = SearchRecord(method="beam", width=2, size=3, objective="worst", combinations=counts, best=("layers.2",))
    assert combination_lines(replace(report(), search=record), "worst")[-1] == (
        "beam search by worst for 3, width 2: 9 of 35 sets evaluated"
    )
    greedy = replace(record, method="greedy", width=1, size=2)
    assert combination_lines(replace(report(), search=greedy), "worst")[-1].startswith(
        "greedy search by worst for 2: 9 of 35 sets evaluated; best to protect: 2,4, 0.09"
    )


def test_the_strongest_synergies_are_shown_by_an_objective_that_sets_have() -> None:
    (by_mean,) = synergy_tables(report(), "mean")
    assert by_mean.title == "protect-one, mean: strongest of 15 of 15 pairs"
    assert by_mean.row_count == SHOWN
    (by_worst,) = synergy_tables(report(), "bpb")
    assert by_worst.title == "protect-one, worst: strongest of 15 of 15 pairs"
    assert list(synergy_tables(planted_sets({("layers.0",): 1.0}), "worst")) == []


def test_whether_the_best_set_needs_its_members_is_one_line() -> None:
    (line,) = necessity_lines(report(), "worst")
    assert line == (
        "2,4: dropping a member clearly hurts for 2 of 2, an exchange for another clearly hurts for 8 of 8 "
        "(10 of 10 changes evaluated)"
    )
    units = tuple(GAIN)[:5]
    alone: dict[tuple[str, ...], float] = {(unit,): gain for unit, gain in GAIN.items()}
    swept = planted_sets(alone | {units: 3.4, (*units[:4], "layers.5"): 2.5}, noise=0.001)
    judged = replace(swept, necessity=EvaluatedSets.of(swept, draws=200).necessity_tests([5]))
    (line,) = necessity_lines(judged, "worst")
    assert line == "0,1,2,3,4: an exchange for another clearly hurts for 1 of 1 (1 of 10 changes evaluated)"


def test_what_a_plan_singles_out_is_listed_or_counted() -> None:
    plain = ProtectionPlan.unprotected("m", 12, Grid())
    assert singled_out(plain) == "no protection"
    some = replace(plain, units=plain.units | {"layers.0": "fp16", "layers.3.down": "int8"}, protect_columns=0.01)
    assert singled_out(some) == "layers 0 in 16 bit; 3.down in 8 bit; 1% of input channels in 16 bit"
    many = replace(plain, units=plain.units | {f"layers.{i}.down": "int8" for i in range(11)})
    assert singled_out(many) == "11 units in 8 bit"


def test_a_table_that_a_terminal_is_too_narrow_for_comes_in_parts_that_repeat_what_names_a_row() -> None:
    figures = [f"figure {i}" for i in range(9)]
    table = Table("layer", "language", *figures, title="many", caption="below")
    for layer in range(3):
        cells = [f"0.{layer}{i}23 {{0.1, 0.2}}" for i in range(9)]
        table.add_row(str(layer), "he", *cells, style="bold" if layer else "")
    console = Console(width=80, file=io.StringIO())
    parts = fitting(table, console, keys=2)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined] # a StringIO
    assert max(map(len, text.splitlines())) <= 80
    assert {tuple(str(column.header) for column in part.columns[:2]) for part in parts} == {("layer", "language")}
    assert [str(column.header) for part in parts for column in part.columns[2:]] == figures
    assert all(f"0.{layer}{i}23 {{0.1, 0.2}}" in text for layer in range(3) for i in range(9))
    assert [part.title for part in parts] == ["many"] + [None] * (len(parts) - 1)
    assert [row.style for part in parts for row in part.rows] == ["", "bold", "bold"] * len(parts)
    assert text.rstrip().endswith("below")


def test_a_table_that_fits_is_left_alone() -> None:
    table = Table("plan", "worst")
    table.add_row("none", "0.1")
    assert fitting(table, Console(width=80)) == [table]
