"""Plans that also quantize what stands around the layers, and biases and norms: simulation only. Step 4, plain data.

No checkpoint format stores these quantized. What they would do to each language can be measured all the same: alone,
and together with everything else. Such plans take no part in rankings and recommendations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Grid, Mode, Precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.sweep.plans import SweptPlan
from quant_fairness_plugin.sweep.units import BIASES, EMBEDDINGS, FINAL_NORM, HEAD, NORMS, POSITIONS, UnitMap

AROUND = (EMBEDDINGS, POSITIONS, BIASES, NORMS, FINAL_NORM, HEAD)
"""What can be named. `biases` and `norms` are those of all layers at once."""


@dataclass(frozen=True, slots=True)
class AroundPlan:
    """A plan in which something besides the layers is quantized."""

    name: str
    """`quantize embeddings`, `none with embeddings+positions`, `protect 0 with embeddings+positions`."""
    mode: Mode | None
    units: tuple[str, ...]
    """What is singled out."""
    quantized: Mapping[str, Precision]
    """Full unit name → precision; all else is in 16 bit."""
    precision: Precision = "fp16"


def spell_around(names: Sequence[str], units: UnitMap) -> dict[str, tuple[str, ...]]:
    """Name → the model's units that it stands for.

    Raises:
        ConfigError: an unknown name, one twice, or something that the model does not have.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in AROUND or name in found:
            what = "listed twice" if name in found else "no unit around the layers"
            raise ConfigError(f"{name!r} is {what}; use {', '.join(AROUND)}, each once")
        own = [f"layers.{layer}.{name}" for layer in range(units.layers)] if name in (BIASES, NORMS) else [name]
        found[name] = tuple(unit for unit in own if units.parameters.get(unit))
        if not found[name]:
            has = [other for other in AROUND if _has(units, other)]
            raise ConfigError(f"the model has no {name} of its own; allowed are {', '.join(has)}. Leave it out.")
    return found


def _has(units: UnitMap, name: str) -> bool:
    return bool(units.parameters.get(f"layers.0.{name}" if name in (BIASES, NORMS) else name))


def check_around(names: Sequence[str], units: UnitMap, shapes: Mapping[str, tuple[int, ...]], grid: Grid) -> None:
    """Refuse what the model does not have, and tables that the grid's groups do not divide.

    Args:
        names: what is to be quantized besides.
        units: the model's units.
        shapes: parameter → shape; that of a tied head may be missing, it is the embeddings'.
        grid: the grid.

    Raises:
        ConfigError: as said.
    """
    for name, own in spell_around(names, units).items():
        for parameter in (parameter for unit in own for parameter in units.parameters[unit]):
            tied = units.parameters[EMBEDDINGS][0] if name == HEAD else parameter
            check_table(parameter, shapes.get(parameter, shapes.get(tied, ())), grid, what=name)


def check_table(parameter: str, shape: Sequence[int], grid: Grid, *, what: str) -> None:
    """Refuse a table of tokens or positions whose rows the grid's groups do not divide; vectors have one scale.

    Raises:
        ConfigError: they do not.
    """
    if len(shape) == 2 and grid.group_size != -1 and shape[1] % grid.group_size:
        raise ConfigError(
            f"{what}: {parameter} has rows of {shape[1]} values, which groups of {grid.group_size} do not divide; use "
            "a group size that does, or -1"
        )


def around_plans(
    names: Sequence[str], units: UnitMap, everything: Sequence[str], modes: Sequence[Mode], quantized: Precision
) -> list[AroundPlan]:
    """The plans that a sweep evaluates besides.

    Under `quantize-one` each name is the only thing that is quantized. Under `protect-one` all of the names are
    quantized together with everything else; then each of them, and each unit of the sweep, is left in 16 bit.

    Args:
        names: what is quantized besides.
        units: the model's units.
        everything: all units that the sweep singles out.
        modes: the modes of the sweep.
        quantized: what a quantized unit gets.

    Raises:
        ConfigError: a name that cannot be used.
    """
    spelled = spell_around(names, units)
    plans: list[AroundPlan] = []
    if "quantize-one" in modes:
        plans += [
            AroundPlan(f"quantize {name}", "quantize-one", (name,), dict.fromkeys(own, quantized))
            for name, own in spelled.items()
        ]
    if names and "protect-one" in modes:
        plans.append(_together(SweptPlan(None), spelled, everything, quantized))
        if len(names) > 1:
            without = [{n: own for n, own in spelled.items() if n != left} for left in spelled]
            plans += [_together(SweptPlan(None), some, everything, quantized) for some in without]
        singles = [SweptPlan("protect-one", (unit,)) for unit in everything]
        plans += [_together(plan, spelled, everything, quantized) for plan in singles]
    return plans


def _together(
    plan: SweptPlan, spelled: Mapping[str, Sequence[str]], everything: Sequence[str], quantized: Precision
) -> AroundPlan:
    besides = dict.fromkeys((unit for own in spelled.values() for unit in own), quantized)
    chosen = plan.precisions(everything, quantized) | besides
    return AroundPlan(f"{plan.name} with {'+'.join(spelled)}", plan.mode, plan.units, chosen)
