"""The Triton kernels on CPU tensors, against float64, through triton's interpreter in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from quant_fairness_kernels.verify import Case, Outcome, grid, relative_error

pytest.importorskip("triton", reason='triton is not installed: pip install "quant-fairness[triton]"')

ROOT = Path(__file__).parents[2]


@cache
def results(size: Literal["small", "full"]) -> dict[str, dict[str, Any]]:
    """One row per case by name; run once, because importing torch and triton costs more than most cases."""
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.interpreted", size]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def check(row: dict[str, Any]) -> None:
    assert row["error"] <= row["tolerance"]
    assert row["repeatable"], "two calls gave different bits"
    assert row["counters_zero"], "the counters were left set"
    assert row["passed"]


@pytest.mark.parametrize("case", grid("small"), ids=lambda case: case.name)
def test_kernel_agrees_with_float64(case: Case) -> None:
    check(results("small")[case.name])


@pytest.mark.kernels
@pytest.mark.parametrize("case", grid("full"), ids=lambda case: case.name)
def test_kernel_agrees_with_float64_on_the_whole_grid(case: Case) -> None:
    check(results("full")[case.name])


def test_broken_kernels_would_be_seen() -> None:
    seen = results("small")["planted"]["seen"]
    assert seen.pop("nothing is wrong") is False
    assert set(seen.values()) == {True}, seen
    assert len(seen) == 3


def test_compiling_around_the_kernel_changes_nothing() -> None:
    assert results("small")["compiled"]["same"] is True


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_grid_covers_what_it_must(size: Literal["small", "full"]) -> None:
    cases = grid(size)
    assert len({case.name for case in cases}) == len(cases)
    assert {1, 2, 3, 7, 16, 17, 33, 64, 130} <= {case.M for case in cases}
    assert {case.K // case.groups for case in cases} >= {32, 64, 128, 333}
    splits = {case.config.split_k for case in cases if case.config is not None}
    assert splits >= (set(range(1, 9)) if size == "full" else {1, 3, 8})
    for field in ("act_order", "columns", "dense", "bias", "silu_mul"):
        assert any(getattr(case, field) for case in cases), field
    assert any(case.N % 2 for case in cases)
    assert any(case.K % 128 for case in cases)
    assert {case.dtype for case in cases} == {"float16", "bfloat16"}
    assert {case.symmetric for case in cases} == {True, False}


def test_a_nan_or_a_changed_bit_does_not_pass() -> None:
    import torch

    good = Outcome(error=1e-4, tolerance=1e-3, repeatable=True, counters_zero=True)
    assert good.passed
    broken = torch.tensor([1.0, float("nan")])
    for outcome in (
        Outcome(relative_error(broken, torch.ones(2)), 1e-3, repeatable=True, counters_zero=True),
        Outcome(2e-3, 1e-3, repeatable=True, counters_zero=True),
        Outcome(1e-4, 1e-3, repeatable=False, counters_zero=True),
        Outcome(1e-4, 1e-3, repeatable=True, counters_zero=False),
    ):
        assert not outcome.passed
