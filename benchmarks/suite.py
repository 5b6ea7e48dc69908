"""The tests with each set of CPU instructions and each number of torch threads: how they ended, as rows.

    python benchmarks/suite.py                                      # six runs of several minutes each
    python benchmarks/suite.py --capabilities avx2 --threads 2      # one of them

`ATEN_CPU_CAPABILITY` limits what torch's own kernels use; the processor has to have it. Every run is that of
`make test`, with two processes. A row replaces the earlier one of the same run. Exit status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rows import conditions

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "suite.jsonl"
CAPABILITIES = ("default", "avx2", "avx512")
OUTCOMES = ("passed", "failed", "skipped", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capabilities", nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    options = parser.parse_args()
    failed = 0
    for capability in options.capabilities:
        for threads in options.threads:
            row = run_tests(capability, threads)
            print(f"{capability}, threads {threads}: {row['outcomes']} in {row['seconds']} s", flush=True)
            store(row)
            failed += row["outcomes"]["failed"] + row["outcomes"]["error"]
    sys.exit(failed > 0)


def run_tests(capability: str, threads: int) -> dict[str, Any]:
    """Run the tests, with their output on this one, and return the row."""
    options = ["-m", "pytest", "--numprocesses", "2", "--dist", "worksteal", "--torch-threads", str(threads)]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the core to those that compute
    used = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    said = subprocess.check_output([sys.executable, "-c", used], env=environment, text=True).split()
    if said != [capability.upper(), str(threads)]:
        sys.exit(f"torch has {' and '.join(said)} threads here instead of {capability} and {threads}: another machine")
    started, lines = time.monotonic(), [""]
    with subprocess.Popen(
        [sys.executable, *options], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout or ():
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    outcomes = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    if "passed" not in outcomes:
        sys.exit(f"pytest ended with {run.returncode} and did not say how many tests passed")
    row = {"capability": capability, "threads": threads, "outcomes": {name: outcomes.get(name, 0) for name in OUTCOMES}}
    command = f"python benchmarks/suite.py --capabilities {capability} --threads {threads}"
    return row | {"seconds": round(time.monotonic() - started)} | conditions(command=command, seed=0)


def store(row: dict[str, Any]) -> None:
    """Keep a row, in place of an earlier one of the same run."""
    from quant_fairness_plugin.artifacts import write_atomically

    def key(each: dict[str, Any]) -> tuple[int, int]:
        return CAPABILITIES.index(each["capability"]), each["threads"]

    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    kept = [each for each in map(json.loads, lines) if key(each) != key(row)]
    ordered = sorted([*kept, row], key=key)
    write_atomically(ROWS, "".join(json.dumps(each) + "\n" for each in ordered).encode())


if __name__ == "__main__":
    main()
