"""What got how many bits: the map of a checkpoint or of a plan."""

from __future__ import annotations

from collections import Counter

from quant_fairness_plugin.artifacts import ExportRecord, Grid, ProtectionPlan
from quant_fairness_plugin.plans.precision_map import bits_of_plan, bits_of_record, module_names, written_bits
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import plan_words

_SHADES = {16: 6, 8: 4, 6: 3, 5: 3}
"""Bits → shade; fewer bits are the lightest."""


def precision_section(plan: ProtectionPlan, record: ExportRecord | None) -> Section:
    """Return the map of layers and modules; of a plan without a checkpoint, layers and what it names apart."""
    bits = bits_of_plan(plan) if record is None else bits_of_record(record)
    columns = list(dict.fromkeys(place for _, place in bits))
    names = module_names(columns)
    layers = sorted({layer for layer, _ in bits})
    counts = Counter(width for widths in bits.values() for width in widths)
    cells = [
        charts.Tile(row=str(layer), column=names[place], shade=_shade(widths), text=written_bits(widths))
        for layer in layers
        for place in columns
        if (widths := bits.get((layer, place)))
    ]
    return Section(
        name="precision",
        title="What got how many bits",
        level="practitioner",
        lead=f"{plan_words(plan).capitalize()}. {_grid(plan.grid, record)} Embeddings, head and norms stay in 16 bit.",
        picture=Picture.of(
            lambda width: charts.tiles(cells, columns=list(names.values()), width=width),
            f"Map of {len(layers)} layers and their modules with the bits of each: {_counted(counts)}.",
        ),
        keys=tuple(Key(symbol=f"shade-{_SHADES.get(width, 1)}", text=f"{width} bit") for width in sorted(counts)),
        table=Table(
            caption="Bits of the weights, by layer and module.",
            columns=("layer", *names.values()),
            rows=tuple(
                (str(layer), *(written_bits(bits.get((layer, place), set())) or "none" for place in columns))
                for layer in layers
            ),
        ),
        notes=tuple(_notes(plan, record)),
    )


def _shade(widths: set[int]) -> int:
    return _SHADES.get(max(widths), 1)


def _counted(counts: Counter[int]) -> str:
    return ", ".join(f"{count} with {width} bit" for width, count in sorted(counts.items()))


def _grid(grid: Grid, record: ExportRecord | None) -> str:
    if record is not None and record.group_sizes:
        return f"Several group sizes, as widths differ: {record.grids}."
    shared = "each output channel" if grid.group_size == -1 else f"each group of {grid.group_size} weights"
    kind = "symmetric grid" if grid.symmetric else "asymmetric grid"
    return f"In what is quantized, {shared} shares a scale ({kind if grid.scheme == 'int' else grid.numbers})."


def _notes(plan: ProtectionPlan, record: ExportRecord | None) -> list[tuple[str, str]]:
    notes = [("Why these?", " ".join(f"{reason.rstrip('.')}." for reason in plan.reasons))] if plan.reasons else []
    if record is not None and record.kept_modules:
        kept = "; ".join(f"{name}: {reason}" for name, reason in record.kept_modules.items())
        notes.append(("What stays in 16 bit although its layer is quantized?", kept))
    return notes
