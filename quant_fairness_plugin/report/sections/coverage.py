"""How much of each language calibration saw."""

from __future__ import annotations

from typing import Any

from quant_fairness_plugin.artifacts import ExportRecord
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import Figure, Language

_WEIGHTS = (
    "What is a weight?",
    "How much the inputs of a language count when the integers are chosen. Equal weights treat all languages alike, "
    "whatever the length of their texts.",
)


def coverage_section(record: ExportRecord) -> Section | None:
    """Return the calibration by language; None where nothing was calibrated."""
    summary: dict[str, Any] = record.calibration
    tokens = summary.get("tokens_per_language")
    if not isinstance(tokens, dict) or not tokens:
        return None
    weights = summary.get("weights") or {}
    rows = summary.get("rows_per_language") or {}
    labels = [Language.of(name).label for name in tokens]
    said = ", ".join(f"{label} {count}" for label, count in zip(labels, tokens.values(), strict=True))
    return Section(
        name="calibration",
        title="What calibration saw",
        level="practitioner",
        lead=(
            f"{sum(tokens.values()):,} tokens, {len(tokens)} languages, from {summary.get('source', 'unknown texts')}; "
            f"weighting: {summary.get('weighting', 'unknown')}."
        ),
        picture=Picture.of(
            lambda width: charts.bars(labels, list(tokens.values()), title="tokens", width=width),
            f"Calibration tokens of each language: {said}.",
        ),
        keys=(Key(symbol="bar", text="tokens"),),
        table=Table(
            caption="Calibration by language.",
            columns=("language", "tokens", "rows", "weight"),
            rows=tuple(
                (
                    Language.of(name),
                    Figure(f"{count:,}"),
                    Figure(str(rows.get(name, "unknown"))),
                    Figure(f"{weights[name]:.3f}" if name in weights else "unknown"),
                )
                for name, count in tokens.items()
            ),
        ),
        notes=(_WEIGHTS,),
    )
