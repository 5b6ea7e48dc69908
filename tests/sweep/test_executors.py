"""Executors: the same bits everywhere, workers that are lost, and workers that outlive nobody."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.errors import ArtifactError, ConfigError, MissingExtraError, ResourceError
from quant_fairness_plugin.measure.rows import Row
from quant_fairness_plugin.model.load import LoadedModel, from_loaded, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep import executors
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.executors import (
    ATTEMPTS,
    Crew,
    LocalExecutor,
    ProcessExecutor,
    ProcessWorker,
    WorkerLostError,
)
from quant_fairness_plugin.sweep.jobs import Job, Recipe, pack, unpack
from quant_fairness_plugin.sweep.make_executor import make_executor
from quant_fairness_plugin.sweep.runner import BatchScores
from quant_fairness_plugin.sweep.walk import plan_tree
from tests.sweep.trial_cases import GRID, PLANS, FatalOnceBank, UnmakeableBank, sweep, texts

Build = Callable[..., Path]
ROOT = Path(__file__).parents[2]
ROWS = tuple((Row("en", 0, (0, *range(5, 9 + number)), 1),) for number in range(5))
TRIALS = dict(enumerate(ROWS))


@pytest.fixture(scope="module")
def folder(tiny_model: Build) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


def job_of(loaded: LoadedModel) -> Job:
    units = map_units(loaded)
    return Job(loaded, plan_tree(PLANS, units), RtnBank(loaded, units, GRID), texts(), 1)


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.glob("*.json")}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_of_which_one_is_killed_give_the_bits_of_the_local_sweep(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = sweep(loaded, tmp_path / "local", LocalExecutor())
    marker = tmp_path / "killed"
    bank = FatalOnceBank(loaded, map_units(loaded), marker=marker)
    with caplog.at_level(logging.WARNING):
        assert sweep(loaded, tmp_path / "processes", ProcessExecutor(2), bank) == expected
    assert marker.exists()
    assert len(caplog.records) == 1
    assert re.search(r"a worker was lost at trial \d+ \(exit status -9\); the trial is run again", caplog.text)
    assert files(tmp_path / "processes") == files(tmp_path / "local")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("spread", "devices"), [(True, ["cuda:0", "cuda:1", "cuda:0"]), (False, ["cpu"])], ids=["all", "one"]
)
def test_every_worker_has_a_device_and_a_replacement_that_of_the_lost_one(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, spread: bool, devices: list[str]
) -> None:
    made: list[Placed] = []

    class Placed:
        """A worker that computes nothing; the first one is lost at its first trial where there are several."""

        def __init__(self, recipe: Recipe) -> None:
            self.device, self.running = recipe.device, True
            made.append(self)

        def start(self, rows: Sequence[Row]) -> None:
            """Nothing."""

        def result(self) -> BatchScores:
            if spread and self is made[0]:
                raise WorkerLostError("lost")
            return {}

        def stop(self) -> None:
            self.running = False

    monkeypatch.setattr(executors, "ProcessWorker", Placed)
    monkeypatch.setattr(executors, "wait_for_processes", lambda workers: workers[:1])
    monkeypatch.setattr(executors, "devices_like", lambda device: ("cuda:0", "cuda:1"))
    results = dict(ProcessExecutor(None if spread else 1, spread=spread).run(job_of(loaded), TRIALS))
    assert results == dict.fromkeys(TRIALS, {})
    assert [worker.device for worker in made] == devices
    assert not any(worker.running for worker in made)


def test_an_interrupt_is_the_business_of_who_started_the_workers_and_ends_them(loaded: LoadedModel) -> None:
    results = ProcessExecutor(1).run(job_of(loaded), TRIALS)
    next(results)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)  # what the terminal does to every process at Ctrl-C
    next(results)
    assert worker.is_alive()
    results.close()
    assert multiprocessing.active_children() == []


def test_workers_end_when_who_started_them_is_killed(folder: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.sweep.trial_cases",
        folder,
        tmp_path,
        "--at",
        "1",
        "--processes",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        _, said = parent.communicate(timeout=120)  # ends when the last process that holds the pipe does
    assert parent.returncode == -signal.SIGKILL, said
    started = [int(pid) for pid in re.findall(r"worker process (\d+)", said)]
    assert len(started) == 1
    deadline = time.monotonic() + 60
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))


def test_what_a_worker_refuses_is_raised_here(loaded: LoadedModel) -> None:
    ours, theirs = multiprocessing.Pipe()
    recipe = pack(replace(job_of(loaded), bank=UnmakeableBank(ConfigError("no such checkpoint on this machine"))))
    executors._serve(theirs, recipe)
    worker = object.__new__(ProcessWorker)  # without a process: what it receives is what counts
    worker.connection = ours
    with pytest.raises(ConfigError, match="no such checkpoint on this machine"):
        worker.result()


def test_a_fault_of_ours_in_a_worker_is_shown_with_its_place(loaded: LoadedModel) -> None:
    ours, theirs = multiprocessing.Pipe()
    recipe = pack(replace(job_of(loaded), bank=UnmakeableBank(ZeroDivisionError("by zero"))))
    with pytest.raises(ZeroDivisionError, match="by zero"):
        executors._serve(theirs, recipe)
    sent = ours.recv()
    assert isinstance(sent, RuntimeError)
    assert "in _fail" in str(sent)


class OwnBank:
    """A bank without a recipe."""

    description = "my own"

    def weights(self, unit: str, precision: Precision) -> Mapping[str, Tensor]:
        return {}


def test_what_no_worker_could_load_is_refused(loaded: LoadedModel, folder: Path) -> None:
    other = load_model(str(folder))
    with pytest.raises(ConfigError, match="is in memory only, and a worker loads it from files; save it and"):
        next(ProcessExecutor(1).run(job_of(from_loaded(other.model, other.tokenizer)), TRIALS))
    with pytest.raises(
        ConfigError, match=r"bank 'my own' has no recipe\(\) to make it again .*; use the local executor"
    ):
        next(ProcessExecutor(1).run(replace(job_of(loaded), bank=OwnBank()), TRIALS))


def test_a_copy_of_a_job_gives_the_same_bits(loaded: LoadedModel) -> None:
    job = job_of(loaded)
    copy = unpack(pickle.loads(pickle.dumps(pack(job))))
    assert copy.loaded.model is not loaded.model
    for rows in ROWS:
        ours, theirs = job.run(rows), copy.run(rows)
        assert all(np.array_equal(ours[state], theirs[state]) for state in ours)


def test_a_worker_with_other_numbers_refuses_to_work_and_says_what_differs(loaded: LoadedModel) -> None:
    recipe = pack(job_of(loaded))
    older = {**recipe.identity["versions"], "torch": "1.0"}
    with pytest.raises(ConfigError, match=r"its versions is .*, here it is .*'torch': '1\.0'.*same model files and"):
        unpack(replace(recipe, identity=recipe.identity | {"versions": older}))
    with pytest.raises(ConfigError, match=r"its model is \{'sha256': '\w+'\}, here it is \{'sha256': 'x'\}"):
        unpack(replace(recipe, identity=recipe.identity | {"model": {"sha256": "x"}}))


class Script:
    """Workers that do what a test says: `lost` trials take their worker with them, so often."""

    def __init__(self, lost: Mapping[int, int] | None = None, fails: int | None = None) -> None:
        self.lost, self.fails = dict(lost or {}), fails
        self.started: list[ScriptedWorker] = []

    def start(self) -> ScriptedWorker:
        self.started.append(ScriptedWorker(self))
        return self.started[-1]


class ScriptedWorker:
    def __init__(self, script: Script) -> None:
        self.script, self.stopped, self.number = script, 0, -1

    def start(self, rows: Sequence[Row]) -> None:
        assert self.stopped == 0
        self.number = len(rows[0].ids) - 5

    def result(self) -> BatchScores:
        if self.number == self.script.fails:
            raise ArtifactError("a plan predicts NaN")
        if self.script.lost.get(self.number, 0):
            self.script.lost[self.number] -= 1
            raise WorkerLostError("exit status -9")
        return {"16 bit": np.full((1, 3), float(self.number))}

    def stop(self) -> None:
        self.stopped += 1


def crew(script: Script, *, workers: int) -> Crew[ScriptedWorker]:
    # The last answers first: nothing may depend on the order.
    return Crew(script.start, lambda busy: busy[-1:], workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_every_trial_is_answered_once_whoever_is_lost(workers: int) -> None:
    script = Script({0: ATTEMPTS - 1, 3: 1})
    found = list(crew(script, workers=workers).work(TRIALS))
    assert sorted(number for number, _ in found) == list(TRIALS)
    assert all(result["16 bit"][0, 0] == number for number, result in found)
    # Where another worker is free, it takes the place of a lost one.
    assert 0 <= len(script.started) - min(workers, len(TRIALS)) <= ATTEMPTS
    assert all(worker.stopped == 1 for worker in script.started)


def test_a_trial_that_ends_every_worker_is_given_up() -> None:
    script = Script({2: ATTEMPTS})
    with pytest.raises(ResourceError, match=r"trial 2 ended its worker 3 times \(exit status -9\).*fewer workers"):
        list(crew(script, workers=2).work(TRIALS))
    assert all(worker.stopped == 1 for worker in script.started)


def test_all_workers_are_ended_when_a_trial_fails_or_nobody_wants_more() -> None:
    failing, left = Script(fails=1), Script()
    with pytest.raises(ArtifactError, match="a plan predicts NaN"):
        list(crew(failing, workers=3).work(TRIALS))
    results = crew(left, workers=3).work(TRIALS)
    next(results)
    results.close()
    assert [worker.stopped for worker in failing.started + left.started] == [1] * 6


def test_there_are_no_more_workers_than_cores_or_memory_for_copies_of_the_model(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, limit = job_of(loaded), tmp_path / "memory.max"
    size = sum(parameter.nbytes for parameter in loaded.model.parameters())
    monkeypatch.setattr(executors, "CONTAINER_LIMIT", limit)
    monkeypatch.setattr(executors, "_cores", lambda: 8)
    assert executors._fitting_workers(job) == 8
    assert executors._fitting_workers(replace(job, threads=3)) == 2
    assert executors._fitting_workers(replace(job, threads=9)) == 1
    limit.write_text("max\n")
    assert executors._fitting_workers(job) == 8
    for copies, workers in ((6, 2), (5, 1), (1, 1)):
        limit.write_text(f"{copies * size}\n")
        assert executors._fitting_workers(job) == workers


def test_executors_are_found_by_name() -> None:
    assert isinstance(make_executor("local"), LocalExecutor)
    assert make_executor("processes", workers=3) == ProcessExecutor(3)
    with pytest.raises(ConfigError, match="executor 'threads' is unknown; use local, processes or ray"):
        make_executor("threads")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="workers is 2, and the local executor has none"):
        make_executor("local", workers=2)
    with pytest.raises(ConfigError, match="workers is 0; use a whole number from 1"):
        make_executor("processes", workers=0)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'needs Ray, .*pip install "quant-fairness\[ray\]"'):
        make_executor("ray")
