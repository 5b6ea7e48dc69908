"""The name under which the seeds import this library: `from quant_fairness import quick_sweep, simulate_int4`."""

from __future__ import annotations

from typing import Any

import quant_fairness_plugin
from quant_fairness_plugin import __all__ as __all__


def __getattr__(name: str) -> Any:
    return getattr(quant_fairness_plugin, name)


def __dir__() -> list[str]:
    return dir(quant_fairness_plugin)
