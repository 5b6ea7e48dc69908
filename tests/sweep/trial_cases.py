"""A small sweep that tests run, kill and run again, here and in child processes; and banks that kill who asks them."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision, StateScores, TextSet
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.sweep.bank import Bank, RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import Executor, LocalExecutor, ProcessExecutor, Results, Trials
from quant_fairness_plugin.sweep.jobs import BankRecipe, Job
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from tests.planted_model import planted_texts

GRID = Grid(group_size=32)
BATCH_TOKENS = 400
PLANS: dict[str, dict[str, Precision]] = {
    "none": {"layers.0": "int3", "layers.1": "int3"},
    "protect 0": {"layers.1": "int3"},
    "mixed": {"layers.0": "int8", "layers.1": "int2", "head": "int4"},
}


def texts() -> TextSet:
    return planted_texts().part("search")


class FatalOnceBank:
    """Round-to-nearest, but the first worker that asks it is killed, as it would be where memory ends."""

    def __init__(self, loaded: LoadedModel, units: UnitMap, *, marker: Path) -> None:
        self._bank, self._marker = RtnBank(loaded, units, GRID), marker

    @property
    def description(self) -> str:
        return self._bank.description

    def recipe(self) -> BankRecipe:
        return partial(FatalOnceBank, marker=self._marker)

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return self._bank.weights(unit, precision)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


class UnmakeableBank:
    """A bank that no worker can make again: the recipe fails with the error that it is given."""

    description = "unmakeable"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def recipe(self) -> BankRecipe:
        return partial(_fail, self._error)

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        return {}


def _fail(error: Exception, loaded: LoadedModel, units: UnitMap) -> Bank:
    raise error


class Asked(LocalExecutor):
    """Runs trials here, and remembers which; stops like Ctrl-C before it would run more than `most`."""

    def __init__(self, most: int = sys.maxsize) -> None:
        self.most, self.asked = most, list[int]()

    def run(self, job: Job, trials: Trials) -> Results:
        for number, found in super().run(job, trials):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(number)
            yield number, found


def sweep(
    loaded: LoadedModel, work: Path | None, executor: Executor | None = None, bank: Bank | None = None
) -> dict[str, StateScores]:
    units = map_units(loaded)
    return score_plans_resumably(
        loaded,
        PLANS,
        texts(),
        units=units,
        bank=bank or RtnBank(loaded, units, GRID),
        batch_tokens=BATCH_TOKENS,
        execution=Execution(work=work, executor=executor),
    )


def die_at_replace(number: int, fault: signal.Signals) -> None:
    """Send this process a signal when it renames a finished trial for the n-th time, before the rename."""
    replace, calls = os.replace, iter(range(1, sys.maxsize))

    def fatal(source: str, target: str) -> None:
        if str(target).endswith(".json") and next(calls) == number:
            os.kill(os.getpid(), fault)
        replace(source, target)

    os.replace = fatal  # type: ignore[assignment] # only the form that is used


def main() -> None:
    """Sweep in a child for each signal, which meets its own; in this process where there is but one.

    A child is forked before torch has threads, and spares the import of torch.
    """
    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", type=Path, help="with several signals, a folder for each of them in it")
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"])
    parser.add_argument("--at", type=int, required=True)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    executor = ProcessExecutor(arguments.processes) if arguments.processes else None
    if len(arguments.signals) == 1:
        return sweep_until(arguments.folder, arguments.work, arguments.signals[0], arguments.at, executor)
    for name in arguments.signals:
        (arguments.work / name).mkdir()
        child = os.fork()
        if not child:
            sweep_until(arguments.folder, arguments.work / name, name, arguments.at, executor)
            os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


def sweep_until(folder: Path, work: Path, name: str, number: int, executor: Executor | None) -> None:
    die_at_replace(number, signal.Signals[name])
    sweep(load_model(str(folder)), work, executor)


if __name__ == "__main__":
    main()
