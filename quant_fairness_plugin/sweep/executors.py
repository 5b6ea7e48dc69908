"""Where the trials of a sweep run: in this process, or in several that each load the model once.

Every trial has the same number of threads wherever it runs, and results are put together by number, not by time: all
executors give the same bits. `ray_executor` runs the same trials on a cluster.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from quant_fairness_plugin.errors import ConfigError, QuantFairnessError, ResourceError
from quant_fairness_plugin.measure.rows import Row
from quant_fairness_plugin.model.devices import devices_like
from quant_fairness_plugin.sweep.jobs import Job, Recipe, pack, unpack
from quant_fairness_plugin.sweep.runner import BatchScores

_logger = logging.getLogger(__name__)

Trials = Mapping[int, Sequence[Row]]
"""Number → rows. The number says where the result belongs."""
Results = Generator[tuple[int, BatchScores], None, None]
"""Number and result, in any order, each as soon as it is there. Closing it ends the workers."""
ATTEMPTS = 3
"""A trial that ends its worker this often is given up: it, and not its neighbours, is what the machine cannot do."""
COPIES = 3
"""Memory of a worker, in models: its weights, their quantized values, and as much again while it loads."""
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Executor(Protocol):
    """Runs trials."""

    def run(self, job: Job, trials: Trials) -> Results:
        """Every trial's result.

        Raises:
            ConfigError: the job cannot be run by this executor.
            ResourceError: a trial ended its worker again and again.
        """


class LocalExecutor:
    """One trial after another in this process, on the model that is loaded."""

    def run(self, job: Job, trials: Trials) -> Results:
        """The trials in their order."""
        for number, rows in trials.items():
            yield number, job.run(rows)


@dataclass(frozen=True, slots=True)
class ProcessExecutor:
    """Trials in processes of this machine, each with its own copy of the model, loaded once.

    A worker that is killed is replaced and its trial run again. Workers end with this process, however it ends: at once
    where it can still say so, else after the trial that they are at.
    """

    workers: int | None = None
    """How many; None is one for every accelerator, and on a CPU as many as cores and memory allow."""
    spread: bool = True
    """Whether workers are spread over all devices of the type that the model is on; else all are on its own."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; use a whole number from 1")

    def run(self, job: Job, trials: Trials) -> Results:
        """Every trial's result."""
        recipe = pack(job)
        devices = devices_like(recipe.device) if self.spread else (recipe.device,)
        count = self.workers or (_fitting_workers(job) if devices == ("cpu",) else len(devices))
        _logger.info("%d trials in %d processes on %s", len(trials), min(count, len(trials)), ", ".join(devices))
        started: list[ProcessWorker] = []

        def start() -> ProcessWorker:
            busy = Counter(worker.device for worker in started if worker.running)
            started.append(ProcessWorker(replace(recipe, device=min(devices, key=lambda device: busy[device]))))
            return started[-1]

        yield from Crew(start, wait_for_processes, workers=count).work(trials)


class WorkerLostError(Exception):
    """A worker ended before its trial did; never leaves the executor."""


class Worker(Hashable, Protocol):
    """One process somewhere, with a copy of the job."""

    def start(self, rows: Sequence[Row]) -> None:
        """Give it a trial. Never fails: that a worker is lost shows when its result is fetched."""

    def result(self) -> BatchScores:
        """The result of the trial.

        Raises:
            WorkerLostError: the worker is gone.
            QuantFairnessError: the trial failed.
        """

    def stop(self) -> None:
        """End it now, whatever it does."""


W = TypeVar("W", bound=Worker)


@dataclass(slots=True)
class Crew(Generic[W]):
    """Keeps workers busy, and replaces those that are lost."""

    start: Callable[[], W]
    wait_for: Callable[[Sequence[W]], Sequence[W]]
    """Those of the workers that have a result, or are gone; waits until there is one."""
    workers: int
    _idle: list[W] = field(default_factory=list)
    _busy: dict[W, int] = field(default_factory=dict)
    _losses: Counter[int] = field(default_factory=Counter)

    def work(self, trials: Trials) -> Results:
        """Run all trials; every worker has ended when this does."""
        waiting = deque(trials)
        try:
            self._fill(waiting, trials)
            while self._busy:
                ready = self.wait_for(list(self._busy))
                results = [result for worker in ready for result in self._collect(worker, waiting)]
                self._fill(waiting, trials)
                yield from results
        finally:
            for worker in (*self._idle, *self._busy):
                worker.stop()

    def _fill(self, waiting: deque[int], trials: Trials) -> None:
        while waiting and len(self._busy) < self.workers:
            worker = self._idle.pop() if self._idle else self.start()
            number = waiting.popleft()
            self._busy[worker] = number
            worker.start(trials[number])

    def _collect(self, worker: W, waiting: deque[int]) -> list[tuple[int, BatchScores]]:
        number = self._busy[worker]
        try:
            scores = worker.result()
        except WorkerLostError as err:
            self._losses[number] += 1
            if self._losses[number] == ATTEMPTS:
                raise ResourceError(
                    f"trial {number} ended its worker {ATTEMPTS} times ({err}), as a machine without memory left does; "
                    "use fewer workers or smaller batches."
                ) from err
            _logger.warning("a worker was lost at trial %d (%s); the trial is run again", number, err)
            del self._busy[worker]
            worker.stop()
            waiting.appendleft(number)
            return []
        del self._busy[worker]
        self._idle.append(worker)
        return [(number, scores)]


class ProcessWorker:
    """A process of this machine. It ends by itself when its pipe does, so it never outlives who started it for long."""

    def __init__(self, recipe: Recipe) -> None:
        self.device = recipe.device
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half-dead
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, recipe), daemon=True)
        # The terminal sends Ctrl-C to every process. This one decides what it means; the child inherits the block.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        _logger.info("worker process %d", self._process.pid)

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.is_alive()

    def start(self, rows: Sequence[Row]) -> None:
        """Send the rows."""
        try:
            self.connection.send(tuple(rows))
        except OSError as err:
            _logger.debug("worker %s is gone: %s", self._process.pid, err)

    def result(self) -> BatchScores:
        """Receive the result."""
        try:
            message: BatchScores | Exception = self.connection.recv()
        except (EOFError, OSError) as err:
            self._process.join()
            raise WorkerLostError(f"exit status {self._process.exitcode}") from err
        if isinstance(message, Exception):
            raise message
        return message

    def stop(self) -> None:
        """Kill the process: it holds nothing that anybody else needs."""
        self.connection.close()
        self._process.kill()
        self._process.join()


def wait_for_processes(workers: Sequence[ProcessWorker]) -> list[ProcessWorker]:
    """Return those that have a result or have ended; wait until there is one."""
    ready = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _serve(connection: Connection, recipe: Recipe) -> None:
    """What a worker process does: load once, then one trial after another until the pipe ends."""
    try:
        job = unpack(recipe)
        while True:
            connection.send(job.run(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except QuantFairnessError as err:
        connection.send(err)
    except Exception:
        connection.send(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))
        raise


def _fitting_workers(job: Job) -> int:
    """As many as there are cores, and as many copies of the model as memory holds."""
    model = sum(parameter.nbytes for parameter in job.loaded.model.parameters())
    return max(1, min(_cores() // job.threads, machine_memory() // (COPIES * model)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int:
    """Bytes that this process and its workers may use together: the machine's, or the container's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = CONTAINER_LIMIT.read_text(encoding="ascii").strip() if CONTAINER_LIMIT.is_file() else "max"
    return min(machine, int(limit)) if limit.isdecimal() else machine
