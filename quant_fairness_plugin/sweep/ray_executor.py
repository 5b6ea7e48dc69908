"""Trials on a Ray cluster (extra `ray`).

Every worker is an actor that loads the model once, from the same path on its own machine. Where no cluster is running
or named (`RAY_ADDRESS`), Ray starts one on this machine, which ends with the sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from quant_fairness_plugin.errors import ConfigError, MissingExtraError, QuantFairnessError
from quant_fairness_plugin.measure.rows import Row
from quant_fairness_plugin.sweep.executors import Crew, Results, Trials, WorkerLostError
from quant_fairness_plugin.sweep.jobs import Job, Recipe, pack, unpack
from quant_fairness_plugin.sweep.runner import BatchScores

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RayExecutor:
    """Trials in actors. An actor that is lost, with its machine or alone, is replaced and its trial run again."""

    workers: int | None = None
    """How many; None is one for every CPU of the cluster (every GPU, where the model is on one)."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; use a whole number from 1")
        _ray()

    def run(self, job: Job, trials: Trials) -> Results:
        """Every trial's result."""
        ray, recipe = _ray(), pack(job)
        # Ray shows every actor its own accelerator alone, which is the first one there.
        recipe = replace(recipe, device=recipe.device.partition(":")[0])
        started = not ray.is_initialized()
        if started:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
        try:
            gpus = int(job.loaded.model.device.type == "cuda")
            count = self.workers or _fitting_actors(ray, job.threads, gpus)
            _logger.info("%d trials in %d Ray actors", len(trials), min(count, len(trials)))
            actor = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_restarts=0)(Actor)
            shared = ray.put(recipe)
            crew = Crew(lambda: RayWorker(ray, actor.remote(shared)), wait_for_actors, workers=count)
            yield from crew.work(trials)
        finally:
            if started:
                ray.shutdown()


class Actor:
    """What Ray runs: one copy of the job, made when the first trial comes, so that a refusal reaches the sweep."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._job: Job | None = None

    def run(self, rows: Sequence[Row]) -> BatchScores:
        """Run one trial."""
        job = self._job or unpack(self._recipe)
        self._job = job
        return job.run(rows)


class RayWorker:
    """One actor, as the crew sees it."""

    def __init__(self, ray: ModuleType, actor: Any) -> None:
        self.ray, self._actor = ray, actor
        self.reference: Any = None

    def start(self, rows: Sequence[Row]) -> None:
        """Queue the trial on the actor."""
        self.reference = self._actor.run.remote(tuple(rows))

    def result(self) -> BatchScores:
        """Get the result."""
        errors = self.ray.exceptions
        try:
            scores: BatchScores = self.ray.get(self.reference)
        except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as err:
            raise WorkerLostError(str(err).splitlines()[0]) from err
        except errors.RayTaskError as err:
            if isinstance(err.cause, QuantFairnessError):
                raise err.cause from err
            raise
        return scores

    def stop(self) -> None:
        """Kill the actor."""
        self.ray.kill(self._actor)


def wait_for_actors(workers: Sequence[RayWorker]) -> list[RayWorker]:
    """Return those that have a result or are gone; wait until there is one."""
    ready, _ = workers[0].ray.wait([worker.reference for worker in workers], num_returns=1)
    return [worker for worker in workers if worker.reference in ready]


def _fitting_actors(ray: ModuleType, threads: int, gpus: int) -> int:
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0)) if gpus else int(resources.get("CPU", 0)) // threads)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as err:
        raise MissingExtraError(
            f"the ray executor needs Ray, which cannot be imported ({err}); allowed without it are local and "
            'processes. Install it: pip install "quant-fairness[ray]".'
        ) from err
    module: ModuleType = ray
    return module
