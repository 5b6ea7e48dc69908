"""Fuzz every parser of files, guided by coverage: `make fuzz SECONDS=60`. Adds a row; a fault is an exit status of 1.

    python benchmarks/fuzz.py --seconds 60 --atheris .venv-fuzz
    python benchmarks/fuzz.py --seconds 60 --atheris .venv-fuzz --target sweep --no-row
    python benchmarks/fuzz.py render

Each target runs in a process of its own for its share of the time. A fault is whatever is not one of our own errors,
more than a second of the processor for one file, or 256 MiB of memory: see tests/fuzz/targets.py. Its file stays in
logs/fuzz, for the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_tables  # noqa: E402 - found by the path above
from benchmarks.rows import conditions  # noqa: E402
from tests.fuzz import CORPUS, MOST_BYTES, MOST_SECONDS, place_in_memory  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "fuzz.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "logs" / "fuzz"
TARGETS = sorted(path.name for path in CORPUS.iterdir())
_RUNS = re.compile(r"stat::number_of_executed_units: +(\d+)")
_FAULT = re.compile(r"^(?:[\w.]+(?:Error|Exception)|AssertionError).*", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "render"), default="run")
    parser.add_argument("--seconds", type=int, default=60, help="in all")
    parser.add_argument("--atheris", type=Path, default=ROOT / ".venv-fuzz", help="folder that holds atheris")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--no-row", action="store_true")
    options = parser.parse_args()
    if options.what == "render":
        return render()
    names = options.target or list(TARGETS)
    share = max(1, options.seconds // len(names))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = fuzz(name, share, options.atheris.resolve())
        print(
            f"{name:<14} {found[name]['executions']:>9,} executions  {found[name]['fault'] or 'no fault'}", flush=True
        )
    faults = [name for name, result in found.items() if result["fault"]]
    total = sum(result["executions"] for result in found.values())
    print(f"{total:,} executions in {share} s for each target, {len(faults)} faults")
    if not options.no_row:
        row = {"targets": found, "executions": total, "faults": len(faults), "seconds_per_target": share}
        row |= {"most_cpu_seconds": MOST_SECONDS, "most_bytes": MOST_BYTES}
        row |= conditions(command=f"make fuzz SECONDS={options.seconds}", seed=0)
        lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
        write_atomically(ROWS, (lines + json.dumps(row) + "\n").encode())
    sys.exit(1 if faults else 0)


def fuzz(name: str, seconds: int, atheris: Path) -> dict[str, Any]:
    """Return how many files a target read, and its fault, if any."""
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as folder, place_in_memory() as place:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, str(seconds), folder, place],
            capture_output=True, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{atheris}"},
        )  # fmt: skip
        runs = _RUNS.search(done.stderr)
        if runs is None:
            sys.exit(f"{name}: atheris did not run: {done.stderr[-2000:]}")
        fault = _FAULT.findall(done.stdout + done.stderr)
        for path in Path(folder).glob("crash-*"):
            KEPT.mkdir(parents=True, exist_ok=True)
            path.rename(KEPT / f"{name}-{path.name}")
        said = fault[-1][:300] if fault else f"ended with status {done.returncode}" if done.returncode else None
        return {"executions": int(runs[1]), "fault": said if done.returncode else None}


def render() -> None:
    """Write what was run into the page, in one sentence."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    total, faults, last = sum(row["executions"] for row in rows), sum(row["faults"] for row in rows), rows[-1]
    said = (
        f"Stored runs: {len(rows)}, with {total:,} files and {faults} faults; the last {last['executions']:,} files in "
        f"{last['seconds_per_target']} s for each of {len(last['targets'])} targets, by revision {last['revision']}. "
        "Ten million files have not been tried.\n"
    )
    write_tables(PAGE, {"fuzz": said})


if __name__ == "__main__":
    main()
