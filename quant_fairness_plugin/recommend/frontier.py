"""The evaluated plans of a sweep by bytes, worst and mean harm, and which of them are worth their bytes. Plain data."""

from __future__ import annotations

import json
from dataclasses import asdict

from quant_fairness_plugin.artifacts import Frontier, SweepReport
from quant_fairness_plugin.recommend.assembly import bytes_of, priced_units, row_choice
from quant_fairness_plugin.statistics.pareto import pareto_frontier
from quant_fairness_plugin.statistics.synergy import EvaluatedSets


def frontier_of(report: SweepReport, *, draws: int = 2000) -> Frontier:
    """Return all plans of a sweep whose bytes are known.

    Args:
        report: the sweep.
        draws: bootstrap resamples of the sentences.
    """
    priced = set(priced_units(report))
    rows = [row for row in report.rows if priced.issuperset(row_choice(report, row))]
    sets, plans = EvaluatedSets.of(report, draws=draws), [row.plan for row in rows]
    return pareto_frontier(
        {row.plan: bytes_of(report, row_choice(report, row)) for row in rows},
        sets.series(plans, "worst"),
        sets.series(plans, "mean"),
    )


def frontier_json(frontier: Frontier, report: SweepReport) -> str:
    """Return the JSON document of a frontier, `schema_version` first."""
    head = {"schema_version": 1, "kind": "frontier", "provenance": asdict(report.provenance)}
    rows = [asdict(row) | {"on_frontier": row.on_frontier} for row in frontier.rows]
    return json.dumps(head | {"rows": rows}, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
