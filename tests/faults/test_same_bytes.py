"""The same command again, in processes of their own: the same plan, checkpoint and page, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted_model import planted_texts, write_planted_model

pytestmark = pytest.mark.limits
ROOT = Path(__file__).parents[2]
ENTRY = "from quant_fairness_plugin.cli.main import main; main()"
COMMON = ("--model", "model", "--texts", "t.json", "--group-size", "32")
RECOMMEND = ("recommend", *COMMON[:4], "--max-overhead", "0.3", "-o", "plan.json")
RUN = ("run", *COMMON, "--max-overhead", "0.3", "-o", "out")
SWEEP = ("sweep", *COMMON, "--work", "work", "--top", "1", "-o", "s.json")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_planted_model(folder / "model")
    few = {language: list(rows[:30]) for language, rows in planted_texts().sentences.items()}
    (folder / "t.json").write_text(json.dumps(few, ensure_ascii=False), encoding="utf-8")
    return folder


def made(start: Path, place: Path, *commands: tuple[str, ...], threads: int = 1) -> dict[str, bytes]:
    """Return what commands make in a folder; `.run.json`, which says when that was, aside."""
    shutil.copytree(start, place)
    # Without PYTHONHASHSEED every process has another order of sets.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-c", ENTRY, *command], cwd=place, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    files = (path for path in place.rglob("*") if path.is_file() and not path.name.endswith(".run.json"))
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def test_plan_checkpoint_and_page_are_the_same_three_times(start: Path, tmp_path: Path) -> None:
    first, *others = (made(start, tmp_path / str(number), RECOMMEND, RUN) for number in range(3))
    written = {"plan.json", "out/model.safetensors", "out/quant_fairness.json", "out/report.html", "out/README.md"}
    assert written <= first.keys()
    assert [differing(first, other) for other in others] == [[], []]


def test_a_sweep_with_work_is_the_same_with_one_thread_and_with_two(start: Path, tmp_path: Path) -> None:
    one, two = (made(start, tmp_path / str(threads), SWEEP, threads=threads) for threads in (1, 2))
    assert {"s.json", "s.html"} <= one.keys()
    assert differing(one, two) == []


def test_another_seed_is_found(start: Path, tmp_path: Path) -> None:
    one, other = (made(start, tmp_path / seed, (*SWEEP, "--seed", seed)) for seed in ("0", "1"))
    assert "s.json" in differing(one, other)
