"""The loop over whole commands, where that takes seconds (`make test-faults` runs all); and the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.faults.cases import CASES, Case, write_start
from tests.faults.loop import Left, Trial, open_trial, run, without_slow_readers
from tests.faults.points import Points

NAMED = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("start").resolve() / "start"
    folder.mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a run that forks on its way must have no threads of torch
    write_start(folder)
    with without_slow_readers():
        yield folder
    torch.set_num_threads(before)


def wrong(trial: Trial, *, every: int) -> list[str]:
    return [
        f"{action} at {trial.points[number - 1]}: {problem}"
        for number, action in trial.meets(every=every)
        for problem in trial.meet(number, action)
    ]


@pytest.mark.parametrize(
    ("name", "every"), [("report", 2), pytest.param("repair --in-place", 25, marks=pytest.mark.limits)]
)
def test_a_command_survives_faults_wherever_it_touches_the_disk(
    name: str, every: int, start: Path, tmp_path: Path
) -> None:
    trial = open_trial(NAMED[name], start, tmp_path.resolve())
    assert wrong(trial, every=every) == []
    assert len(trial.points) >= 4


@pytest.mark.limits
def test_copies_that_are_not_kept_before_the_change_are_found(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(path: Path, content: bytes) -> None:
        path.write_bytes(content)

    monkeypatch.setattr("quant_fairness_plugin.export.repair.write_atomically", in_place)
    trial = open_trial(NAMED["repair --in-place"], start, tmp_path.resolve())
    found = wrong(trial, every=1000)
    assert any(line.startswith("kill -9 at write theirs/config.json") and "neither" in line for line in found), found


def repeat(case: Case, start: Path, place: Path, threads: Sequence[int]) -> list[Left]:
    """Run a command in several fresh folders, each with its number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for number, count in enumerate(threads):
            torch.set_num_threads(count)
            (place / str(number)).mkdir()
            found.append(open_trial(case, start, place / str(number)).expected)
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.limits
def test_the_same_run_gives_the_same_bytes(start: Path, tmp_path: Path) -> None:
    first, *others = repeat(NAMED["run"], start, tmp_path.resolve(), (1, 1, 1))
    assert {"out/model.safetensors", "out/quant_fairness.json", "out/report.html"} <= first.tree.keys()
    assert all(other.tree == first.tree for other in others)


@pytest.mark.limits
def test_trials_give_the_same_bytes_with_other_numbers_of_threads(start: Path, tmp_path: Path) -> None:
    one, two = repeat(NAMED["sweep --work"], start, tmp_path.resolve(), (1, 2))
    assert {"s.json", "s.html"} <= one.tree.keys()
    assert two.tree == one.tree


def test_a_run_is_watched_without_being_changed(start: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    left = run(("report", "none"), Points(tmp_path.resolve() / "root"))
    assert (left.status, left.said.count("error: "), left.points) == (5, 1, ())
