"""What starting a run takes: Python with all that a run imports."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache


@cache
def start_seconds() -> float:
    """Return the seconds of computing that a fresh Python takes to import what a run imports. Tried once a process."""
    before = os.times()
    line = [sys.executable, "-c", "import quant_fairness_plugin.fair_quantizer"]
    subprocess.run(line, check=False, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
