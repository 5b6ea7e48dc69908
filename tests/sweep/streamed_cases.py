"""A small sweep layer by layer that tests run, in one process or in one that is killed while it writes states."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision, StateScores, TextSet
from quant_fairness_plugin.model import stacks as stacks_module
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.streaming import score_plans_layerwise
from tests.planted_model import planted_texts

GRID = Grid(group_size=-1)
LAYERS, WIDTH = 3, 40
BATCH_TOKENS = 120
PLENTY = 10**9
EVERYTHING: dict[str, Precision] = {f"layers.{i}": "int3" for i in range(LAYERS)}
PLANS: dict[str, dict[str, Precision]] = {
    "none": EVERYTHING,
    **{f"protect {i}": {k: v for k, v in EVERYTHING.items() if k != f"layers.{i}"} for i in range(LAYERS)},
    "mixed": {"layers.0": "int8", "layers.1": "int2"},
}


def texts() -> TextSet:
    """Four sentences in two languages: three batches."""
    return planted_texts().part("search").take(range(4))


def streamed_scores(
    loaded: LoadedModel, *, plans: Mapping[str, Mapping[str, Precision]] = PLANS, budget: int = PLENTY, **options: Any
) -> dict[str, StateScores]:
    units = map_units(loaded)
    bank = options.pop("bank", None) or RtnBank(loaded, units, GRID, keep=False)
    how = {name: options.pop(name) for name in ("work", "prefetch") if name in options}
    execution = Execution(memory_budget=budget, **how)
    options = {"batch_tokens": BATCH_TOKENS} | options
    return score_plans_layerwise(loaded, plans, texts(), units=units, bank=bank, execution=execution, **options)


def die_after_layer_1() -> None:
    """Kill this process in the middle of writing the states after layer 1 of the first batch."""
    plain = stacks_module._Writer.put

    def fatal(self: stacks_module._Writer, node: int, values: Tensor) -> None:
        plain(self, node, values)
        if self._stack.stage == 2 and node == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    stacks_module._Writer.put = fatal  # type: ignore[method-assign]


def main() -> None:
    folder, work = sys.argv[1:]
    die_after_layer_1()
    streamed_scores(open_streamed(folder), work=Path(work), prefetch=False)


if __name__ == "__main__":
    main()
