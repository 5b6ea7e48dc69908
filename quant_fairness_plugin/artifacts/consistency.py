"""What the fields of an artifact say of each other. Their types alone let through what no command has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quant_fairness_plugin.artifacts.data import ExportRecord, ProtectionPlan
from quant_fairness_plugin.artifacts.evidence import Evidence
from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.artifacts.sweeps import SweepReport
from quant_fairness_plugin.artifacts.units import Unit


def check(artifact: Any) -> None:
    """Refuse an artifact whose fields contradict each other.

    Raises:
        ValueError: says which.
    """
    rule = _RULES.get(type(artifact))
    if rule is not None:
        rule(artifact)


def _check_plan(plan: ProtectionPlan) -> None:
    odd = next((name for name in plan.units if not Unit.is_name(name)), None)
    if odd is not None:
        raise ValueError(f"units: {odd[:50]!r} names no layer and no fusion group of one")
    units = [Unit.parse(name) for name in plan.units]
    layers = {unit.layer for unit in units if unit.group is None}
    if not layers or layers != set(range(len(layers))) or any(unit.layer not in layers for unit in units):
        raise ValueError("units: does not give every layer, from the first to the last, a precision")


def _check_experts(coverage: ExpertCoverage) -> None:
    languages = set(next(iter(coverage.reached.values()), ()))
    for name, table in (("calibrated", coverage.calibrated), ("reached", coverage.reached), ("gates", coverage.gates)):
        if table.keys() != coverage.reached.keys() or not table:
            raise ValueError(f"{name}: is not about the same layers as the rest")
        for layer, counts in table.items():
            if name != "calibrated" and counts.keys() != languages:
                raise ValueError(f"{name}.{layer}: is not about the same languages as the rest")
            if any(len(row) != coverage.experts for row in counts.values()):
                raise ValueError(f"{name}.{layer}: does not have a figure for each of {coverage.experts} experts")


def _check_record(record: ExportRecord) -> None:
    _check_plan(record.plan)
    if record.experts is not None:
        _check_experts(record.experts)


def _check_evidence(evidence: Evidence) -> None:
    _check_plan(evidence.plan)


def _check_sweep(report: SweepReport) -> None:
    pass


_RULES: Mapping[type[Any], Callable[[Any], None]] = {
    ProtectionPlan: _check_plan,
    ExportRecord: _check_record,
    Evidence: _check_evidence,
    ExpertCoverage: _check_experts,
    SweepReport: _check_sweep,
}
