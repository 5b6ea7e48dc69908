"""The checkpoint beside the 16-bit model and the same quantization without protection: what each costs and is for."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import ExportRecord, Measurement
from quant_fairness_plugin.report.section import Section, Table, joined
from quant_fairness_plugin.report.words import Cell, Figure, Language, number, size
from quant_fairness_plugin.statistics.configurations import SIXTEEN_BIT, Configuration, configurations

_COLUMNS = ("configuration", "size", "of 16 bit", "loss of the worst language", "disparity", "other languages", "use")


def configurations_section(record: ExportRecord, before: Measurement | None) -> Section | None:
    """Return the part of a checkpoint; None where it was not measured."""
    rows = configurations(record, before)
    if record.measurement is None or not rows:
        return None
    reference = record.measurement.reference
    against = "the reference language" if reference is None else Language.of(reference).name
    return Section(
        name="configurations",
        title="What the other choices are",
        level="practitioner",
        lead=_lead(rows),
        table=Table(
            caption=f"Losses in bits per byte. Disparity: mean loss of the other languages over that of {against}.",
            columns=_COLUMNS,
            rows=tuple(_cells(row) for row in rows),
        ),
        table_open=True,
    )


def _lead(rows: list[Configuration]) -> str:
    return f"{joined([f'{size(row.bytes_)} for {_what(row)}' for row in rows])}."


def _what(row: Configuration) -> str:
    return f"the {row.name}" if row.name == SIXTEEN_BIT else row.name


def _cells(row: Configuration) -> tuple[Cell, ...]:
    found: tuple[Cell, ...] = (row.name, Figure(size(row.bytes_)), Figure(f"{row.of_16_bit:.0%}"))
    if row.name == SIXTEEN_BIT:
        return *found, Figure("0"), "", "", row.use
    return *found, number(row.worst_kl), number(row.disparity), row.label, row.use
