"""The configurations that a checkpoint's record knows, side by side: bytes, damage, disparity, and what each is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant_fairness_plugin.artifacts import ExportRecord, Interval, Measurement, Number, Undefined
from quant_fairness_plugin.statistics.labels import label

SIXTEEN_BIT, THIS = "16-bit model", "this checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One state of a model, all supported languages together."""

    name: str
    bytes_: int
    """Of the weights on disk."""
    of_16_bit: float
    worst_kl: Number
    disparity: Number
    """Mean KL of the other languages over that of the reference."""
    label: str
    """What the disparity's interval says."""
    use: str = ""


def configurations(record: ExportRecord, before: Measurement | None = None) -> list[Configuration]:
    """Return the 16-bit model, the same quantization without protection where it was measured, and the checkpoint.

    Args:
        record: of a checkpoint, with its weight files listed; without a measurement there is nothing to compare.
        before: what was measured without protection, where the record does not hold it.
    """
    if record.measurement is None:
        return []
    whole, size = record.sixteen_bit_bytes, record.weight_bytes
    same = Configuration(
        name=SIXTEEN_BIT, bytes_=whole, of_16_bit=1.0, worst_kl=Interval(0.0, 0.0, 0.0),
        disparity=Undefined("nothing is lost"), label="nothing is lost", use="where its bytes do not matter",
    )  # fmt: skip
    rows = [_row(THIS, size, whole, record.measurement)]
    unprotected = record.unprotected or before
    if unprotected is not None:
        # A twin holds every value in 16 bit, whatever is protected.
        smaller = size if record.format == "fp16-twin" else size - record.plan.extra_bytes
        rows.insert(0, _row(f"{record.plan.grid.precision.upper()} without protection", smaller, whole, unprotected))
    return [same, *(replace(row, use=_use(row, rows)) for row in rows)]


def _row(name: str, size: int, whole: int, measured: Measurement) -> Configuration:
    lost = [row.language for row in measured.languages if row.status == "collapsed"]
    undefined = Undefined(f"collapsed in {', '.join(lost)}") if lost else None
    disparity = undefined or measured.disparity or Undefined("not recorded")
    return Configuration(
        name=name, bytes_=size, of_16_bit=size / whole, worst_kl=undefined or measured.worst_kl,
        disparity=disparity, label=label(disparity),
    )  # fmt: skip


def _use(row: Configuration, rows: Sequence[Configuration]) -> str:
    if not isinstance(row.worst_kl, Interval):
        return "none"
    better = (
        other.name
        for other in rows
        if isinstance(other.worst_kl, Interval)
        and other.bytes_ <= row.bytes_
        and other.worst_kl.estimate < row.worst_kl.estimate
    )
    other = next(better, None)
    return "worth its bytes" if other is None else f"none: {other} takes no more and loses less"
