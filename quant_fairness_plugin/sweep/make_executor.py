"""Executors by name: this process, worker processes, or Ray."""

from __future__ import annotations

from typing import Literal

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.sweep.executors import Executor, LocalExecutor, ProcessExecutor

ExecutorName = Literal["local", "processes", "ray"]


def make_executor(name: ExecutorName, *, workers: int | None = None, spread: bool = True) -> Executor:
    """Return the executor of a name.

    Args:
        name: `local`, `processes` or `ray`.
        workers: how many workers; None is as many as fit. `local` has none.
        spread: give workers all devices of the type that the model is on, one after another; else all of them its own.

    Raises:
        ConfigError: no such executor, or workers for `local`.
        MissingExtraError: Ray is not installed.
    """
    match name:
        case "local":
            if workers is not None:
                raise ConfigError(
                    f"workers is {workers}, and the local executor has none. Leave it out, or use processes."
                )
            return LocalExecutor()
        case "processes":
            return ProcessExecutor(workers, spread=spread)
        case "ray":
            from quant_fairness_plugin.sweep.ray_executor import RayExecutor

            return RayExecutor(workers)
    raise ConfigError(f"executor {name!r} is unknown; use local, processes or ray")
