"""What 16-bit input channels cost a plan, from weight shapes alone. Step 4 (sweep)."""

from __future__ import annotations

from dataclasses import replace

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.columns import column_bytes, has_columns
from quant_fairness_plugin.quantize.selection import Selection, select_modules
from quant_fairness_plugin.sweep.engine import count_bytes
from quant_fairness_plugin.sweep.sizes import plan_bytes


def with_columns(plan: ProtectionPlan, loaded: LoadedModel, share: float) -> ProtectionPlan:
    """The plan with a share of the input channels of what it quantizes in 16 bit, their bytes and a reason added."""
    if not share:
        return plan
    selected = select_modules(loaded, plan.grid, protected=plan.protected_layers, overrides=plan.overrides)
    cost = _cost(selected, loaded, share)
    return replace(
        plan,
        protect_columns=share,
        extra_bytes=plan.extra_bytes + cost,
        overhead=round((plan.extra_bytes + cost) / _floor(loaded, plan.grid), 6),
        reasons=(*plan.reasons, f"{100 * share:.3g}% of the input channels of each quantized module: {cost} bytes"),
    )


def layers_budget(loaded: LoadedModel, grid: Grid, share: float, max_overhead: float) -> float:
    """What is left of a budget for layers, if everything is quantized but a share of the input channels.

    Raises:
        ConfigError: nothing is.
    """
    if not share:
        return max_overhead
    cost = _cost(select_modules(loaded, grid), loaded, share) / _floor(loaded, grid)
    if cost > max_overhead:
        raise ConfigError(
            f"protect_columns {share:g} alone costs {cost:.1%} extra bytes, more than max_overhead {max_overhead:.1%}; "
            "protect fewer columns, or raise the budget"
        )
    return max_overhead - cost


def _cost(selected: Selection, loaded: LoadedModel, share: float) -> int:
    shapes = [
        linear_weight(loaded.model.get_submodule(name)).shape
        for name in selected.modules
        if has_columns(selected.grids[name], share)
    ]
    return sum(column_bytes(rows, cols, share) for rows, cols in shapes)


def _floor(loaded: LoadedModel, grid: Grid) -> int:
    return plan_bytes(*count_bytes(loaded, grid), ())
