"""What routed experts cannot be quantized with: known before torch is loaded."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.methods import find_method

SINGLE_EXPERTS = (
    "the routed experts of a layer have one precision: servers keep them in one tensor, and readers refuse single ones"
)


def check_experts(method: str, grid: Grid, *, columns: float = 0.0, backend: str = "native") -> None:
    """Refuse what the routed experts of a mixture cannot be quantized with.

    Args:
        method: a known method.
        grid: a checked grid.
        columns: share of input channels in 16 bit.
        backend: a known backend.

    Raises:
        ConfigError: AWQ, a clip by language, channels in 16 bit, or another tool.
    """
    if find_method(method).moves_scales:
        raise ConfigError(
            f"method {method!r} divides the module in front by its scales, and one norm stands in front of the router "
            "and all experts: what is divided for one would change the routing; use method 'gptq' or 'rtn'"
        )
    if grid.clip == "minimax":
        raise ConfigError(
            "clip 'minimax' compares languages in every group of channels, and most experts see too few tokens of "
            "some language for that; use clip 'mse' or 'absmax'"
        )
    if columns:
        raise ConfigError(
            f"protect_columns {columns:g}: no server and no kernel here adds 16-bit channels to routed experts; "
            "protect whole units with protect_units, such as 3.experts"
        )
    if backend != "native":
        raise ConfigError(
            f"backend {backend!r} calibrates experts without counting tokens by language; use backend 'native'"
        )
