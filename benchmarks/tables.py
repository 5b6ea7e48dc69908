"""Every table of the documentation from its stored rows. Loads no model; seconds.

    make tables                       # writes the pages; says how old the rows of each are
    python benchmarks/tables.py age   # says that alone

A row says when it was finished and, since rows carry it, by which revision. `age` asks git what has changed since then
in what figures come from (`CODE`): rows are not wrong for that, but whoever quotes them should know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "architectures",
    "beginnings_table",
    "calibration_table",
    "capabilities",
    "claims",
    "clip_table",
    "columns",
    "controls_table",
    "depth_table",
    "effort_table",
    "faults",
    "hypotheses_table",
    "llamacpp_table",
    "forecast_table",
    "fuzz",
    "load",
    "peers_table",
    "plan_table",
    "protection_table",
    "real_model",
    "sweep",
    "trifecta_table",
)
"""Each has `ROWS`, `PAGE`, and `render`, which writes the one into the other."""
CODE = tuple(
    f"quant_fairness_plugin/{room}"
    for room in ("measure", "model", "quantize", "planning", "recommend", "sweep", "texts")
)


def script(name: str) -> ModuleType:
    """Return a script as a module."""
    return import_module(name)


def rows_of(module: ModuleType) -> list[dict[str, Any]]:
    """Return the stored rows of a script; none where it was never run."""
    stored: Path = module.ROWS
    return [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()] if stored.exists() else []


def age(name: str) -> str:
    """Return one line on the oldest row of a page, and on what has changed in the code since."""
    module = script(name)
    page = module.PAGE.relative_to(ROOT)
    if not rows_of(module):
        return f"{page!s:24} no rows: not measured yet"
    oldest = min(rows_of(module), key=lambda row: made(module, row))
    commits = _git("log", "--oneline", f"--since={made(module, oldest)}", "--", *CODE).splitlines()
    since = f"{len(commits)} commits to the code since" if commits else "the code has not changed since"
    revision = oldest.get("revision", "revision not stored")
    return f"{page!s:24} oldest row {made(module, oldest)[:10]}, {revision}: {since}"


def made(module: ModuleType, row: dict[str, Any]) -> str:
    """Return when a row was finished; of old ones that do not say, when their file was last committed."""
    told = row.get("finished") or row.get("time")
    return str(told or _git("log", "-1", "--format=%cI", "--", str(module.ROWS)).strip())


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def main() -> None:
    """Write all pages unless only their age is asked for."""
    for name in SCRIPTS:
        if sys.argv[1:] != ["age"]:
            script(name).render()
        sys.stdout.write(f"{age(name)}\n")


if __name__ == "__main__":
    main()
