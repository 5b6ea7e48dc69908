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
MOVED = 0.1
"""Of integers and scales. Their inputs differ in the last bits of float32, in which refinement works: a scale on the
edge between two 16-bit numbers falls to either side (40 of 864 do), and integers with it. A mix-up moves most."""
TWO_DEVICES = "Expected all tensors to be on the same device"


def run_line(model: Path, out: Path) -> dict[str, Any]:
    """Return what `tests/pretend_line.py` prints."""
    command = [sys.executable, "-m", "tests.pretend_line", str(model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_whole_line_on_another_device(planted_model: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    """One test, so that workers do not run the line twice: it takes fifteen seconds."""
    line = run_line(planted_model, tmp_path / "out")
    with subtests.test("the model is on the device and every result says so"):
        assert line["placed"]
        assert line["device"] == ["cpu", "pretend"]
    with subtests.test("every step gives the numbers of the cpu"):
        assert line["equal"] == {"bpb": True, "plan": True}
        assert max(line["moved"]) < MOVED
        assert line["kl_distance"] < TOLERANCE
        assert line["written"]
    for planted in ("planted_buffer", "planted_sums"):
        with subtests.test("a tensor that is left on the cpu is found", planted=planted):
            assert TWO_DEVICES in line[planted]
