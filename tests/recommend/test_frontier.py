from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

from quant_fairness_plugin.recommend.frontier import frontier_json, frontier_of
from tests.planted import planted_sets

GAIN = {"layers.0": 1.0, "layers.1": 0.4, "layers.2": 0.6, "layers.3": 0.0}
SETS: dict[tuple[str, ...], float] = {(unit,): gain for unit, gain in GAIN.items()} | {
    pair: GAIN[pair[0]] + GAIN[pair[1]] for pair in combinations(GAIN, 2)
}
FLOOR, STEP, WIDE = 500 + 4 * 260, 740, 250


def test_one_plan_of_each_size_is_worth_its_bytes() -> None:
    report = planted_sets(SETS, others={"int8": {"layers.0": 0.99}}, noise=0.001)
    frontier = frontier_of(report, draws=200)
    assert frontier.plans == ("none", "int8 0", "protect 0", "protect 0+2")
    sizes = {row.plan: row.bytes_ for row in frontier.rows}
    assert [sizes[plan] for plan in frontier.plans] == [FLOOR, FLOOR + WIDE, FLOOR + STEP, FLOOR + 2 * STEP]
    assert len(frontier.rows) == len(report.rows)
    document = json.loads(frontier_json(frontier, report))
    assert list(document)[:2] == ["schema_version", "kind"]
    assert [row["plan"] for row in document["rows"] if row["on_frontier"]] == list(frontier.plans)


def test_units_that_are_quantized_alone_leave_all_others_in_16_bit() -> None:
    report = planted_sets({(unit,): gain for unit, gain in GAIN.items()}, noise=0.001)
    rows = tuple(replace(row, mode="quantize-one", precision="int4") if row.units else row for row in report.rows)
    frontier = frontier_of(replace(report, rows=rows), draws=200)
    assert {row.bytes_ for row in frontier.rows} == {FLOOR, FLOOR + 3 * STEP}
