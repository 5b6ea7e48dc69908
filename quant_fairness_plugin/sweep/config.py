"""Which plans to sweep, named together so that a report can be asked whether it holds them. Step 4 (sweep)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from quant_fairness_plugin.artifacts import Granularity, Mode, Precision, SweepReport
from quant_fairness_plugin.plans.search import Search


class SweepChoices(TypedDict, total=False):
    """The plans of a sweep besides its modes; each optional, with the defaults of `sweep_units`."""

    granularity: Granularity
    """Single out whole layers, or the fusion groups in them."""
    precisions: Sequence[Precision]
    """What each is singled out at; `fp16`, and others for a plan of several precisions."""
    combine: int
    """2 for pairs besides, 3 for triples too."""
    search: Search | None
    """How to look for sets of layers or units to protect besides."""
    max_plans: int
    """Most pairs, and most triples."""
    top: int
    """How many the stability figures are about."""
    also: Sequence[str]
    """What around the layers, or which vectors in them, further plans quantize besides; simulation only."""


def answers(report: SweepReport, modes: Sequence[Mode], choices: SweepChoices) -> bool:
    """Whether a report holds all that is asked for. Another one would silently lack plans."""
    given = report.provenance.arguments
    search, combine = choices.get("search"), choices.get("combine", 1)
    asked: dict[str, Any] = {"granularity": choices.get("granularity", "layer")}
    if "top" in choices:
        asked["top"] = choices["top"]
    if search is not None:
        asked["search"] = asdict(search)
    if combine > 1 and "max_plans" in choices:
        asked["max_plans"] = choices["max_plans"]
    if choices.get("also"):
        asked["also"] = list(choices["also"])
    return (
        set(modes) <= set(report.modes)
        and set(choices.get("precisions", ())) <= set(report.precisions)
        and combine <= report.combine
        and all(given[name] == value for name, value in asked.items())
    )
