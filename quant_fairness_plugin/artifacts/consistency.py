"""What the fields of an artifact say of each other. Their types alone let through what no command has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quant_fairness_plugin.artifacts.answers import Answers
from quant_fairness_plugin.artifacts.checkpoints import ExportRecord
from quant_fairness_plugin.artifacts.evidence import Evidence
from quant_fairness_plugin.artifacts.experts import ExpertCoverage
from quant_fairness_plugin.artifacts.measurements import Measurement
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.artifacts.plans import ProtectionPlan
from quant_fairness_plugin.artifacts.sweeps import SweepReport
from quant_fairness_plugin.artifacts.units import Unit

_MOST_BYTES = 2**62
"""Sums of them are computed with 64 bits."""


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
            if not Unit.is_layer(layer) or not counts:
                raise ValueError(f"{name}.{layer[:50]}: is no layer with a figure for at least one language")
            if any(len(row) != coverage.experts for row in counts.values()):
                raise ValueError(f"{name}.{layer}: does not have a figure for each of {coverage.experts} experts")


def _check_calibration(calibration: Mapping[str, Any]) -> None:
    for name in ("tokens_per_language", "rows_per_language", "weights"):
        table = calibration.get(name, {})
        if not isinstance(table, dict) or not all(type(value) in (int, float) for value in table.values()):
            raise ValueError(f"calibration.{name}: is no table from languages to numbers")


def _check_measurement(measurement: Measurement) -> None:
    answers = measurement.answers
    if isinstance(answers, Answers) and not all(row.answers for row in answers.languages):
        raise ValueError("answers: a language has none")
    # KL is never below 0: where every resample has some, so has the sample. What divides by it asks for the bound only.
    if any(row.kl_bits_per_byte.estimate <= 0 < row.kl_bits_per_byte.low for row in measurement.languages):
        raise ValueError("languages: a loss of 0 with an interval above 0")


def _check_pair(pair: CheckpointPair) -> None:
    for measurement in (pair.first, pair.second):
        _check_measurement(measurement)
    first, second = ([row.language for row in measured.languages] for measured in (pair.first, pair.second))
    if first != second:
        raise ValueError("second: is not about the same languages as first")


def _check_record(record: ExportRecord) -> None:
    _check_plan(record.plan)
    _check_calibration(record.calibration)
    if not 0 < record.sixteen_bit_bytes < _MOST_BYTES:
        raise ValueError(f"sixteen_bit_bytes: {record.sixteen_bit_bytes} is no size of a model")
    if any(not 0 <= file.bytes_ < _MOST_BYTES for file in record.files.values()):
        raise ValueError("files: one has a size that no file has")
    for measurement in filter(None, (record.measurement, record.unprotected)):
        _check_measurement(measurement)
    if record.experts is not None:
        _check_experts(record.experts)


def _check_evidence(evidence: Evidence) -> None:
    _check_plan(evidence.plan)


def _check_sweep(report: SweepReport) -> None:
    if report.provenance.seed < 0:
        raise ValueError(f"provenance.seed: {report.provenance.seed} is below 0")
    _check_sizes(report)
    _check_rows(report)
    _check_scores(report)


def _check_sizes(report: SweepReport) -> None:
    sizes = report.layer_bytes
    if not {"fp16", "quantized"} <= sizes.keys() or report.layers < 1:
        raise ValueError("layer_bytes: does not have the bytes of every layer as fp16 and quantized")
    for name, row in sizes.items():
        if len(row) != report.layers or not all(0 <= size < _MOST_BYTES for size in row):
            raise ValueError(f"layer_bytes.{name[:50]}: is not a size for each of {report.layers} layers")
    if not 0 <= report.other_bytes < _MOST_BYTES:
        raise ValueError(f"other_bytes: {report.other_bytes} is no size")
    if not report.other_bytes + sum(sizes["fp16"]):
        raise ValueError("layer_bytes: a model of no bytes")


def _check_rows(report: SweepReport) -> None:
    modes = {row.mode for row in report.rows} - {None}
    if not modes or not any(len(row.units) == 1 for row in report.rows):
        raise ValueError("rows: single out no unit")
    for row in (*report.rows, *report.around):
        if {damage.language for damage in row.damage} != report.languages.keys():
            raise ValueError(f"rows: {row.plan[:50]!r} is not about the languages of the sweep")
        if row.plan not in report.scores:
            raise ValueError(f"scores: lacks {row.plan[:50]!r}")
    for row in report.rows:
        if bool(row.units) != (row.mode is not None) or bool(row.units) != (row.precision is not None):
            raise ValueError(f"rows: {row.plan[:50]!r} does not say what its units get")
        for name in row.units:
            if not Unit.is_name(name) or Unit.parse(name).layer >= report.layers:
                raise ValueError(f"rows: {name[:50]!r} is no unit of {report.layers} layers")


def _check_scores(report: SweepReport) -> None:
    sentences = {
        len(row)
        for state in report.scores.values()
        for scores in state.languages.values()
        for row in (scores.nll_nats, scores.tokens, scores.bytes_, scores.kl_nats, scores.flips)
    }
    if len(sentences) != 1 or sentences == {0}:
        raise ValueError("scores: states and languages do not have the same number of sentences, at least one")
    for name, state in report.scores.items():
        if state.languages.keys() != report.languages.keys():
            raise ValueError(f"scores.{name[:50]}: is not about the languages of the sweep")
        if any(min(scores.bytes_) < 0 or not any(scores.bytes_) for scores in state.languages.values()):
            raise ValueError(f"scores.{name[:50]}: a language has no bytes")


_RULES: Mapping[type[Any], Callable[[Any], None]] = {
    ProtectionPlan: _check_plan,
    Measurement: _check_measurement,
    CheckpointPair: _check_pair,
    ExportRecord: _check_record,
    Evidence: _check_evidence,
    ExpertCoverage: _check_experts,
    SweepReport: _check_sweep,
}
