"""The methods of quantization: one file and one line of `METHODS` each. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.methods.awq import Awq
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.methods.rtn import Rtn

METHODS: dict[str, Method] = {
    "rtn": Rtn(),
    "gptq": Gptq(),
    "awq": Awq(),
}
"""Name → method with its default options."""


def find_method(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ConfigError: no such method; lists those that there are.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; use {method_names()}")
    return METHODS[name]


def method_names(suits: Callable[[Method], bool] = lambda method: True) -> str:
    """Return the names of the methods that suit, for a message: `'rtn', 'gptq' or 'awq'`."""
    *names, last = (repr(name) for name, method in METHODS.items() if suits(method))
    return f"{', '.join(names)} or {last}" if names else last


def check_method_grid(method: Method, grid: Grid) -> None:
    """Refuse a grid that a method cannot be used with.

    Raises:
        ConfigError: another clipping rule or width than the method's.
    """
    if grid.clip not in method.clips:
        raise ConfigError(
            f"clip {grid.clip!r} cannot be used with method {method.name!r}, which takes {', '.join(method.clips)}; "
            f"use one of these, or method {method_names(lambda other: grid.clip in other.clips)}"
        )
    if grid.bits not in method.bits:
        raise ConfigError(
            f"bits {grid.bits} cannot be used with method {method.name!r}, which takes "
            f"{', '.join(map(str, method.bits))}; use one of these, or method "
            f"{method_names(lambda other: grid.bits in other.bits)}"
        )


def check_method(name: str, grid: Grid, *, sweeps: bool) -> None:
    """Refuse a grid that a method, or the sweep before it, cannot be used with.

    Args:
        name: of the method.
        grid: a checked grid.
        sweeps: whether the layers are first swept, which is done by rounding to nearest.

    Raises:
        ConfigError: an unknown method, a clipping rule or width that it does not take, or a clipping rule that a sweep
            cannot use.
    """
    check_method_grid(find_method(name), grid)
    if sweeps and grid.clip not in METHODS["rtn"].clips:
        raise ConfigError(
            f"clip {grid.clip!r} cannot be swept: a sweep rounds without calibration; give the protected layers "
            "(--protect-layers 0,9,11 or none), or use clip 'mse'"
        )
