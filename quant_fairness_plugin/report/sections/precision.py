"""What got how many bits: the map of a checkpoint or of a plan."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from quant_fairness_plugin.artifacts import ExportRecord, Grid, ProtectionPlan, Unit, bits_of_precision
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table
from quant_fairness_plugin.report.words import plan_words

_MODULE = re.compile(r"^(?:.+?\.)?(\d+)\.(.+)$")
"""A module of a block: `model.layers.3.mlp.down_proj`."""
_EXPERT = re.compile(r"\.\d+(?=\.|$)")
_WHOLE = "layer"
_SHADES = {16: 6, 8: 4, 6: 3, 5: 3}
"""Bits → shade; fewer bits are the lightest."""

Bits = dict[tuple[int, str], set[int]]
"""Layer and module → bits; several for the experts of one layer."""


def precision_section(plan: ProtectionPlan, record: ExportRecord | None) -> Section:
    """Return the map of layers and modules; of a plan without a checkpoint, layers and what it names apart."""
    bits = _of_plan(plan) if record is None else _of_record(record)
    columns = list(dict.fromkeys(place for _, place in bits))
    names = _names(columns)
    layers = sorted({layer for layer, _ in bits})
    counts = Counter(width for widths in bits.values() for width in widths)
    cells = [
        charts.Tile(row=str(layer), column=names[place], shade=_shade(widths), text=_written(widths))
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
                (str(layer), *(_written(bits.get((layer, place), set())) or "none" for place in columns))
                for layer in layers
            ),
        ),
        notes=tuple(_notes(plan, record)),
    )


def _of_plan(plan: ProtectionPlan) -> Bits:
    names = {Unit.parse(name): bits_of_precision(kind) for name, kind in plan.units.items() if Unit.is_name(name)}
    return {(unit.layer, unit.group or _WHOLE): {width} for unit, width in names.items()}


def _of_record(record: ExportRecord) -> Bits:
    """Return the bits of every module; a missing one has 16 where the plan gives its layer, or a part of it, 16."""
    bits: Bits = {}
    for name, width in [*record.quantized_modules.items(), *((name, 16) for name in record.kept_modules)]:
        match = _MODULE.match(name)
        if match:
            bits.setdefault((int(match[1]), _EXPERT.sub(".*", match[2])), set()).add(width)
    if not bits:
        return _of_plan(record.plan)
    places = list(dict.fromkeys(place for _, place in bits))
    for layer in range(record.plan.layers):
        named = {record.plan.units.get(f"layers.{layer}"), *record.plan.overrides_in(layer).values()}
        if "fp16" in named:
            bits |= {(layer, place): {16} for place in places if (layer, place) not in bits}
    return bits


def _names(places: Sequence[str]) -> dict[str, str]:
    """Return a name for each module: its last part, as `down_proj`, or the whole where two end alike."""
    short = {place: place if place.endswith(".*") else place.rsplit(".", 1)[-1] for place in places}
    ends = Counter(short.values())
    return {place: name if ends[name] == 1 else place for place, name in short.items()}


def _shade(widths: set[int]) -> int:
    return _SHADES.get(max(widths), 1)


def _written(widths: set[int]) -> str:
    return "/".join(map(str, sorted(widths)))


def _counted(counts: Counter[int]) -> str:
    return ", ".join(f"{count} with {width} bit" for width, count in sorted(counts.items()))


def _grid(grid: Grid, record: ExportRecord | None) -> str:
    if record is not None and record.group_sizes:
        return f"Several group sizes, as widths differ: {record.grids}."
    shared = "each output channel" if grid.group_size == -1 else f"each group of {grid.group_size} weights"
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"In what is quantized, {shared} shares a scale ({kind} grid)."


def _notes(plan: ProtectionPlan, record: ExportRecord | None) -> list[tuple[str, str]]:
    notes = [("Why these?", " ".join(f"{reason.rstrip('.')}." for reason in plan.reasons))] if plan.reasons else []
    if record is not None and record.kept_modules:
        kept = "; ".join(f"{name}: {reason}" for name, reason in record.kept_modules.items())
        notes.append(("What stays in 16 bit although its layer is quantized?", kept))
    return notes
