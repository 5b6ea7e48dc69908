"""Reading many checkpoints in turn: an answer or a reason for each, and none of them ends the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BATCH = Path(__file__).with_name("batch.py")
READER = """
import os, sys, time
def read(checkpoint, request):
    if checkpoint == "raises":
        raise KeyError("layer 7")
    if checkpoint == "exits":
        sys.exit("no such model")
    if checkpoint == "hangs":
        time.sleep(60)
    if checkpoint == "dies":
        os.abort()
    return {"said": request["prompts"], "process": os.getpid()}
"""


def run(folder: Path, checkpoints: list[str], *options: str) -> dict[str, dict[str, Any]]:
    script, asked, listed = folder / "reader.py", folder / "request.json", folder / "jobs.json"
    script.write_text(READER, encoding="utf-8")
    asked.write_text(json.dumps({"prompts": [[1, 2]]}), encoding="utf-8")
    jobs = [
        {"checkpoint": name, "request": str(asked), "result": str(folder / f"{name}.json"), "seconds": 1}
        for name in checkpoints
    ]
    listed.write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run([sys.executable, BATCH, script, listed, *options], check=True, capture_output=True, timeout=60)
    paths = {name: folder / f"{name}.json" for name in checkpoints}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


@pytest.mark.parametrize("options", [(), ("--fork",)])
def test_a_failure_is_a_result_and_the_next_checkpoint_is_read(tmp_path: Path, options: tuple[str, ...]) -> None:
    answers = run(tmp_path, ["raises", "exits", "hangs", "good"], *options)
    assert "KeyError: 'layer 7'" in answers["raises"]["error"]
    assert "SystemExit: no such model" in answers["exits"]["error"]
    assert "TimeoutError" in answers["hangs"]["error"]
    assert answers["good"]["said"] == [[1, 2]]


def test_a_child_that_dies_leaves_the_next_checkpoint_alone(tmp_path: Path) -> None:
    answers = run(tmp_path, ["dies", "good"], "--fork")
    assert list(answers) == ["good"]


def test_forked_checkpoints_share_no_process(tmp_path: Path) -> None:
    forked = run(tmp_path, ["a", "b"], "--fork")
    assert forked["a"]["process"] != forked["b"]["process"]
    together = run(tmp_path, ["c", "d"])
    assert together["c"]["process"] == together["d"]["process"]
