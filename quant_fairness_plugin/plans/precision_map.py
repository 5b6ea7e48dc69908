"""What got how many bits, by layer and module: of a checkpoint, or of a plan without one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from quant_fairness_plugin.artifacts import ExportRecord, ProtectionPlan, Unit, bits_of_precision

_MODULE = re.compile(r"^(?:.+?\.)?(\d+)\.(.+)$")
"""A module of a block: `model.layers.3.mlp.down_proj`."""
_EXPERT = re.compile(r"\.\d+(?=\.|$)")
_WHOLE = "layer"

Bits = dict[tuple[int, str], set[int]]
"""Layer and module → bits; several for the experts of one layer."""


def bits_of_plan(plan: ProtectionPlan) -> Bits:
    """Return the bits of every layer, and of the units that a plan names apart."""
    names = {Unit.parse(name): bits_of_precision(kind) for name, kind in plan.units.items() if Unit.is_name(name)}
    return {(unit.layer, unit.group or _WHOLE): {width} for unit, width in names.items()}


def bits_of_record(record: ExportRecord) -> Bits:
    """Return the bits of every module; a missing one has 16 where the plan gives its layer, or a part of it, 16."""
    bits: Bits = {}
    for name, width in [*record.quantized_modules.items(), *((name, 16) for name in record.kept_modules)]:
        match = _MODULE.match(name)
        if match:
            bits.setdefault((int(match[1]), _EXPERT.sub(".*", match[2])), set()).add(width)
    if not bits:
        return bits_of_plan(record.plan)
    places = list(dict.fromkeys(place for _, place in bits))
    for layer in range(record.plan.layers):
        named = {record.plan.units.get(str(Unit(layer))), *record.plan.overrides_in(layer).values()}
        if "fp16" in named:
            bits |= {(layer, place): {16} for place in places if (layer, place) not in bits}
    return bits


def module_names(places: Sequence[str]) -> dict[str, str]:
    """Return a name for each module: its last part, as `down_proj`, or the whole where two end alike."""
    short = {place: place if place.endswith(".*") else place.rsplit(".", 1)[-1] for place in places}
    ends = Counter(short.values())
    return {place: name if ends[name] == 1 else place for place, name in short.items()}


def written_bits(widths: set[int]) -> str:
    """Return `4`, or `4/8` for experts of several."""
    return "/".join(map(str, sorted(widths)))


def layer_ranges(layers: Sequence[int]) -> str:
    """Return ascending layers as ranges.

    >>> layer_ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
