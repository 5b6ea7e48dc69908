"""How a sweep is run: what it resumes from, where its trials run, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.sweep.executors import Executor
from quant_fairness_plugin.sweep.jobs import BankRecipe


@dataclass(frozen=True, slots=True)
class Execution:
    """How a sweep is run. None of it changes a result by more than float32 additions in another order.

    Raises:
        ConfigError: a memory budget together with an executor, or threads below 1.
    """

    work: Path | None = None
    """A folder of finished trials (with a memory budget also of what lies between two layers), from which a sweep that
    was interrupted goes on; sweeps can share one."""
    executor: Executor | None = None
    """Where the trials run; None is this process."""
    memory_budget: int | None = None
    """Bytes; the sweep then goes layer by layer, which a model from `open_streamed` needs."""
    threads: int = 1
    """Of a trial, with `work` or `executor`: float32 sums depend on how they are split."""
    prefetch: bool = True
    """Layer by layer: read the next block while one is run."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; use a whole number from 1")
        if self.memory_budget is not None and self.executor is not None:
            raise ConfigError(
                "a memory budget and an executor do not go together: an executor gives each process a whole model. "
                "Leave out --executor, or --memory-budget."
            )

    @property
    def by_trials(self) -> bool:
        """Whether the sweep is cut into trials, with the whole model in memory."""
        return self.memory_budget is None and (self.work is not None or self.executor is not None)

    def check(self, loaded: LoadedModel, bank_recipe: BankRecipe | None) -> None:
        """Refuse a model or a bank that cannot be swept this way.

        Raises:
            ConfigError: blocks that are in their files without a memory budget, or a bank with one.
        """
        if self.memory_budget is None and isinstance(loaded, StreamedModel):
            raise ConfigError(
                "the model is read from its files block by block and no memory budget is given; give memory_budget, a "
                "number of bytes, or load the whole model"
            )
        if self.memory_budget is not None and bank_recipe is not None:
            raise ConfigError("a bank from a checkpoint and a memory budget do not go together; leave one of them out")
