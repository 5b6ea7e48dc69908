"""The quickstart example runs as written on the bundled model and leaves a checkpoint that verifies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quant_fairness_plugin.export.verify import verify

ROOT = Path(__file__).parents[1]


def test_the_quickstart_ends_with_a_verified_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), "demo", str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the suite runs two processes on two cores
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("plan: (")
    assert [line.split(":")[0] for line in lines[2:6]] == ["en", "fr", "he", "zh"]
    assert lines[6].startswith("protection ")
    assert verify(out).complete
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in out.iterdir()}
