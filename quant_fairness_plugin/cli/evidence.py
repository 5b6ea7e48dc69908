"""`recommend --verify`: the plan and its controls, evaluated on the confirm part; the verdict goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quant_fairness_plugin.artifacts import Evidence, ProtectionPlan, SweepReport, save
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import number, unit_list
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.resolve import model_sha256
from quant_fairness_plugin.preflight import ModelSource, preflight


def verified(
    plan: ProtectionPlan, swept: SweepReport, source: ModelSource, config: FairConfig, *, evidence: Path | None
) -> ProtectionPlan:
    """Return the plan with what its evaluation says. Print the table of controls and the verdict on stderr.

    Args:
        plan: what was recommended.
        swept: the sweep that it came from; its model must be the one of `source`.
        source: the model.
        config: texts and seed.
        evidence: a file to save everything in, or None.

    Raises:
        ConfigError: another model than the one that was swept, or a plan that protects nothing.
    """
    preflight(source, config)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    languages = tuple(name for name, status in swept.languages.items() if status == "supported")
    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, replace(config, languages=languages), progress=shown)
        if model_sha256(quantizer.loaded.files) != swept.provenance.model_sha256:
            raise ConfigError(
                f"{source.name} is not the model that was swept ({swept.provenance.model}): their weights differ. Name "
                "the same one with --model, or sweep this one"
            )
        measured = quantizer.evidence(plan)
    if evidence is not None:
        save(measured, evidence)
    Console(stderr=True).print(evidence_table(measured))
    sys.stderr.write(f"{measured.verdict}\n")
    return replace(plan, predicted=False, reasons=(*plan.reasons, measured.verdict))


def evidence_table(evidence: Evidence) -> Table:
    """Return every plan that was evaluated, the best first; of the random ones only the best and the worst."""
    table = Table(title=f"Equal bytes, {evidence.grid}, KL in bits per byte on sentences that nothing was selected on")
    for name in ("plan", "protects", "bytes", "worst language", "mean", "the plan"):
        table.add_column(name)
    outcomes: Mapping[str, str] = {row.control: row.outcome for row in evidence.comparisons}
    words = {"beaten": "beats it", "not beaten": "does not beat it", "better": "is worse", "undefined": "undefined"}
    size = evidence.row("the plan").bytes_
    order = sorted(evidence.rows, key=lambda row: getattr(row.worst, "estimate", float("inf")))
    random = [row.name for row in order if row.name.startswith("random ")]
    for row in (row for row in order if row.name not in random[1:-1]):
        kinds = sorted({kind for kind in row.precisions.values()})
        places = ", ".join(unit_list([name]) for name in row.precisions)
        table.add_row(
            row.name,
            f"{places} in {' and '.join(kinds)}" if places else "nothing",
            f"{row.bytes_ / size - 1:+.1%}",
            number(row.worst),
            number(row.mean),
            words.get(outcomes.get(row.name, ""), ""),
        )
    return table
