"""Interrupted sweeps: the same bits as uninterrupted ones, and no result that belongs to anything else."""

from __future__ import annotations

import errno
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import StateScores, digest, lock
from quant_fairness_plugin.errors import ConfigError, ResourceError
from quant_fairness_plugin.measure.rows import Row
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep import jobs, trials
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import LocalExecutor, Results, Trials
from quant_fairness_plugin.sweep.jobs import Job
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import plan_tree, score_plans
from tests.sweep.trial_cases import BATCH_TOKENS, GRID, PLANS, Asked, sweep, texts

Build = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tiny_model: Build) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, StateScores], Path]:
    """Scores and work folder of a sweep that nothing interrupted."""
    work = tmp_path_factory.mktemp("whole")
    return sweep(loaded, work), work


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.glob("*.json")}


def fill(work: Path, content: dict[str, bytes]) -> Path:
    work.mkdir(exist_ok=True)
    for name, data in content.items():
        (work / name).write_bytes(data)
    return work


def test_trials_give_the_bits_of_the_plain_sweep(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path]
) -> None:
    units = map_units(loaded)
    bank = RtnBank(loaded, units, GRID)
    with jobs.fixed_threads(1):  # as trials run: float32 sums depend on how they are split
        plain = score_plans(loaded, PLANS, texts(), units=units, bank=bank, batch_tokens=BATCH_TOKENS)
    assert whole[0] == plain
    assert sweep(loaded, None) == plain
    assert len(files(whole[1])) > 3


def test_finished_trials_are_not_run_again(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path], tmp_path: Path
) -> None:
    executor = Asked()
    assert sweep(loaded, fill(tmp_path / "work", files(whole[1])), executor) == whole[0]
    assert executor.asked == []


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_sweep_that_is_interrupted_anywhere_runs_only_the_rest(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path], tmp_path: Path, done: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(loaded, tmp_path, Asked(done))
    assert len(files(tmp_path)) == done
    rest = Asked()
    assert sweep(loaded, tmp_path, rest) == whole[0]
    assert rest.asked == list(range(done, len(files(whole[1]))))
    assert files(tmp_path) == files(whole[1])


FAULTS = ("SIGKILL", "SIGTERM", "SIGINT")


@pytest.fixture(scope="module")
def died(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path]:
    """Exit statuses of sweeps that each met a signal while they wrote their third trial, and where they lie."""
    place = tmp_path_factory.mktemp("died")
    command: list[str | Path] = [sys.executable, "-m", "tests.sweep.trial_cases", folder, place, "--at", "3"]
    done = subprocess.run(
        [*command, "--signals", *FAULTS], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {name: int(status) for name, status in map(str.split, done.stdout.splitlines())}, place


@pytest.mark.parametrize("fault", FAULTS)
def test_a_killed_process_loses_the_trial_that_it_was_writing_and_nothing_else(
    loaded: LoadedModel,
    whole: tuple[dict[str, StateScores], Path],
    died: tuple[dict[str, int], Path],
    fault: str,
) -> None:
    statuses, work = died[0], died[1] / fault
    assert statuses[fault] == -signal.Signals[fault]
    assert len(files(work)) == 2
    resumed = Asked()
    assert sweep(loaded, work, resumed) == whole[0]
    assert resumed.asked[0] == 2
    assert files(work) == files(whole[1])


def _another_number(content: bytes) -> bytes:
    document = json.loads(content)
    document["scores"]["none"][0][0] += 1e-9
    return json.dumps(document).encode()


def _without_a_state(content: bytes) -> bytes:
    document = json.loads(content)
    del document["scores"]["none"]
    document["sha256"] = digest(document["scores"])
    return json.dumps(document).encode()


def _without_a_row(content: bytes) -> bytes:
    document = json.loads(content)
    document["scores"] = {state: rows[1:] for state, rows in document["scores"].items()}
    document["sha256"] = digest(document["scores"])
    return json.dumps(document).encode()


def _older(content: bytes) -> bytes:
    return json.dumps(json.loads(content) | {"schema_version": jobs.RESULT_VERSION - 1}).encode()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "torn": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff" + content,
    "another number": _another_number,
    "not a number": lambda content: content.replace(b"0.0", b"NaN", 1),
    "no document": lambda content: b"[1, 2]\n",
    "a state less": _without_a_state,
    "a row less": _without_a_row,
    "an older form": _older,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_computed_again_and_that_is_said(
    loaded: LoadedModel,
    whole: tuple[dict[str, StateScores], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    content = files(whole[1])
    name = sorted(content)[1]
    work = fill(tmp_path / "work", content | {name: DAMAGE[damage](content[name])})
    executor = Asked()
    with caplog.at_level(logging.WARNING):
        assert sweep(loaded, work, executor) == whole[0]
    assert len(executor.asked) == 1
    assert [name in record.getMessage() for record in caplog.records] == [True]
    assert "is computed again" in caplog.text
    assert files(work) == content


def test_a_result_under_the_name_of_another_is_not_taken_for_it(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    units = map_units(loaded)
    job = Job(loaded, plan_tree(PLANS, units), RtnBank(loaded, units, GRID), texts(), 1)
    store = trials.open_store(tmp_path, job, batch_tokens=64)
    rows, others = [Row("en", 0, (0, 5, 6), 1)], [Row("en", 0, (0, 5, 7), 1)]
    store.write(rows, job.run(rows))
    store.path(rows).rename(store.path(others))
    with caplog.at_level(logging.WARNING):
        assert store.read(others) is None
    assert "its key or checksum is another" in caplog.text


def test_two_sweeps_at_once_in_one_folder_do_no_harm(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path], tmp_path: Path
) -> None:
    class Overtaken(LocalExecutor):
        def run(self, job: Job, trials: Trials) -> Results:
            results = super().run(job, trials)
            first = next(results)
            assert sweep(loaded, tmp_path) == whole[0]
            yield first
            yield from results

    assert sweep(loaded, tmp_path, Overtaken()) == whole[0]
    assert files(tmp_path) == files(whole[1])


def test_a_result_that_many_write_is_whole_whenever_it_is_read(loaded: LoadedModel, tmp_path: Path) -> None:
    units = map_units(loaded)
    job = Job(loaded, plan_tree(PLANS, units), RtnBank(loaded, units, GRID), texts(), 1)
    rows = [Row("en", 0, (0, 5, 6), 1)]
    store, found = trials.open_store(tmp_path, job, batch_tokens=64), job.run(rows)
    store.write(rows, found)

    def write_often() -> None:
        for _ in range(10):
            store.write(rows, found)

    writers = [threading.Thread(target=write_often) for _ in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read = store.read(rows)
        assert read is not None
        assert {state: values.tobytes() for state, values in read.items()} == {
            state: values.tobytes() for state, values in found.items()
        }
    assert [path.name for path in tmp_path.glob("*.json*")] == [store.path(rows).name]


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path], tmp_path: Path
) -> None:
    mine, *_ = files(whole[1])
    killed, living = tmp_path / f".{mine}.partial-aaaaaaaa", tmp_path / f".{mine}.partial-bbbbbbbb"
    foreign = tmp_path / "notes.json.partial-x"
    for path in (killed, living, foreign):
        path.write_bytes(b"half")
    (tmp_path / f".{mine}.partial-cccccccc").symlink_to("gone")  # nobody's: it is left alone
    with living.open() as file:
        assert lock(file.fileno()) == "ours"
        sweep(loaded, tmp_path, Asked())
        assert (killed.exists(), living.exists(), foreign.exists()) == (False, True, True)


def test_the_number_of_threads_around_a_sweep_changes_nothing(
    loaded: LoadedModel, whole: tuple[dict[str, StateScores], Path], tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert sweep(loaded, tmp_path) == whole[0]
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path) == files(whole[1])


def test_progress_starts_where_the_sweep_was_left(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(loaded, tmp_path, Asked(2))
    units, seen = map_units(loaded), list[tuple[int, int]]()
    score_plans_resumably(
        loaded,
        PLANS,
        texts(),
        units=units,
        bank=RtnBank(loaded, units, GRID),
        batch_tokens=BATCH_TOKENS,
        execution=Execution(work=tmp_path),
        progress=lambda *step: seen.append(step),
    )
    passes = plan_tree(PLANS, units).block_passes
    trial_count = len(files(tmp_path))
    assert seen == [(done * passes, trial_count * passes) for done in range(2, trial_count + 1)]


def test_a_work_folder_that_cannot_be_used_is_refused(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: not a folder; use a folder"):
        sweep(loaded, tmp_path / "file")
    with pytest.raises(ResourceError, match=r"cannot be used \(Not a directory\); use a folder"):
        sweep(loaded, tmp_path / "file" / "below")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trials, "write_atomically", full)
    with pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\); finished trials stay"):
        sweep(loaded, tmp_path / "work")


def test_no_threads_are_refused() -> None:
    with pytest.raises(ConfigError, match="threads is 0; use a whole number from 1"):
        Execution(threads=0)
