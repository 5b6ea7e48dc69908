"""The whole line on a device that is not the CPU, and tensors left behind on the CPU, which are found.

The device is a pretence (see `tests/pretend.py`): it shows where tensors are placed, not how fast or how exact another
device is. It renames a backend of torch, so it has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = 1e-4
"""Nats of a sentence of some 30 tokens and some 60 nats: float32 products that are added in another order."""
TWO_DEVICES = "Expected all tensors to be on the same device"


@pytest.fixture(scope="module")
def line(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests/pretend_line.py` prints."""
    command = [
        sys.executable,
        "-m",
        "tests.pretend_line",
        str(planted_model),
        str(tmp_path_factory.mktemp("out") / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_model_is_on_the_device_and_every_result_says_so(line: dict[str, Any]) -> None:
    assert line["placed"]
    assert line["device"] == ["cpu", "pretend"]


def test_every_step_gives_the_numbers_of_the_cpu(line: dict[str, Any]) -> None:
    assert line["equal"] == {"bpb": True, "plan": True, "tensors": True}
    assert line["kl_distance"] < TOLERANCE
    assert line["written"]


@pytest.mark.parametrize("planted", ["planted_buffer", "planted_sums"])
def test_a_tensor_that_is_left_on_the_cpu_is_found(line: dict[str, Any], planted: str) -> None:
    assert TWO_DEVICES in line[planted]
