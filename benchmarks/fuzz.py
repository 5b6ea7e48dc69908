"""Fuzz every parser of files, guided by coverage: `make fuzz SECONDS=60`. Adds a row; a fault is an exit status of 1.

    python benchmarks/fuzz.py --seconds 60
    python benchmarks/fuzz.py --seconds 60 --target sweep --no-row
    python benchmarks/fuzz.py --seconds 600 --rounds 9 --keep logs/fuzz/kept
    python benchmarks/fuzz.py minimise --keep logs/fuzz/kept
    python benchmarks/fuzz.py render

Each target runs in a process of its own for its share of the time. A fault is whatever is not one of our own errors,
more than a second of the processor for one file, or 256 MiB of memory: see tests/fuzz/targets.py. Its file stays in
logs/fuzz, for the corpus.

Every round adds a row, so that a long run that is cut off loses its last round. With `--keep`, what reached new code
stays in a folder for each target, and every round begins with what is there. `minimise` takes the fewest of these files
into the corpus that reach all that they reach together; `make test` reads them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_tables  # noqa: E402 - found by the path above
from benchmarks.rows import conditions  # noqa: E402
from tests.fuzz import CORPUS, LONGEST, MOST_BYTES, MOST_SECONDS, content_name, place_in_memory  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "fuzz.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
FAULTS = ROOT / "logs" / "fuzz"
TARGETS = sorted(path.name for path in CORPUS.iterdir())
PROMISED = 10_000_000
"""Executions, of all targets together."""
_RUNS = re.compile(r"stat::number_of_executed_units: +(\d+)")
_FAULT = re.compile(r"^(?:[\w.]+(?:Error|Exception)|AssertionError).*", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "minimise", "render"), default="run")
    parser.add_argument("--seconds", type=int, default=60, help="of a round, for all targets together")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for what reached new code; read again by the next round")
    parser.add_argument("--longest", type=int, default=LONGEST, help="bytes of a file; short ones are read sooner")
    parser.add_argument("--atheris", type=Path, default=ROOT / ".venv-fuzz", help="folder that holds atheris")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--no-row", action="store_true")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.what == "render":
        return render()
    if options.what == "minimise":
        if options.keep is None:
            parser.error("minimise needs --keep FOLDER, with what earlier runs kept")
        return minimise(options.keep, names)
    faults = 0
    for _ in range(options.rounds):
        faults += one_round(options, names)
    sys.exit(1 if faults else 0)


def one_round(options: argparse.Namespace, names: list[str]) -> int:
    """Fuzz each target for its share of the time, add the row, and return the number of faults."""
    share, seed = max(1, options.seconds // len(names)), len(rows()) + 1
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with folder_for(name, options.keep) as kept:
            found[name] = fuzz(name, (share, seed, options.longest), options.atheris.resolve(), kept)
        print(
            f"{name:<14} {found[name]['executions']:>9,} executions  {found[name]['fault'] or 'no fault'}", flush=True
        )
    faults = sum(result["fault"] is not None for result in found.values())
    total = sum(result["executions"] for result in found.values())
    print(f"{total:,} executions in {share} s for each target, {faults} faults", flush=True)
    if not options.no_row:
        row = {"targets": found, "executions": total, "faults": faults, "seconds_per_target": share}
        row |= {"most_cpu_seconds": MOST_SECONDS, "most_bytes": MOST_BYTES, "longest": options.longest}
        row |= conditions(command=command_of(options), seed=seed)
        lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
        write_atomically(ROWS, (lines + json.dumps(row) + "\n").encode())
    return faults


def command_of(options: argparse.Namespace) -> str:
    """Return the command that does a round again, without the names of folders."""
    targets = "".join(f" --target {name}" for name in options.target or ())
    longest = f" --longest {options.longest}" if options.longest != LONGEST else ""
    kept = " --keep FOLDER" if options.keep is not None else ""
    return f"python benchmarks/fuzz.py --seconds {options.seconds}{targets}{longest}{kept}"


def rows() -> list[dict[str, Any]]:
    """Return what is stored, oldest first."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return [json.loads(line) for line in lines]


@contextmanager
def folder_for(name: str, keep: Path | None) -> Iterator[Path]:
    """Yield where what a target finds is written: in the folder that is kept, or in one that is not."""
    if keep is not None:
        kept = keep.resolve() / name
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
    else:
        with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as folder:
            yield Path(folder)


def fuzz(name: str, limits: tuple[int, int, int], atheris: Path, kept: Path) -> dict[str, Any]:
    """Fuzz one target.

    Args:
        name: the target.
        limits: seconds, seed and bytes of a file.
        atheris: the folder that holds it.
        kept: the folder of what reached new code.

    Returns:
        How many files it read, how many are kept now, and its fault, if any.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-faults-") as faults, place_in_memory() as place:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.guided", name, *map(str, limits), kept, faults, place],
            capture_output=True, text=True, errors="replace", cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{atheris}"},
        )  # fmt: skip
        runs = _RUNS.search(done.stderr)
        if runs is None:
            sys.exit(f"{name}: atheris did not run: {done.stderr[-2000:]}")
        fault = _FAULT.findall(done.stdout + done.stderr)
        for path in Path(faults).iterdir():
            FAULTS.mkdir(parents=True, exist_ok=True)
            shutil.move(path, FAULTS / f"{name}-{path.name}")
    said = fault[-1][:300] if fault else f"ended with status {done.returncode}" if done.returncode else None
    return {
        "executions": int(runs[1]), "kept": len(list(kept.iterdir())), "fault": said if done.returncode else None,
    }  # fmt: skip


def minimise(keep: Path, names: list[str]) -> None:
    """Add the fewest of the kept files to the corpus that reach what they all reach, smallest first."""
    from tests.fuzz.reach import few_that_reach  # all that the targets import, which a run needs not

    logging.disable(logging.CRITICAL)
    for name in names:
        found = sorted((keep / name).iterdir(), key=lambda path: (path.stat().st_size, path.name))
        chosen = few_that_reach(name, [path.read_bytes() for path in found])
        for content in chosen:
            write_atomically(CORPUS / name / content_name(content), content)
        print(f"{name:<14} {len(found):>6,} kept, {len(chosen):>3} taken, {sum(map(len, chosen)):>8,} bytes")


def render() -> None:
    """Write what was run into the page, in a few sentences."""
    write_tables(PAGE, {"fuzz": said_of(rows())})


def said_of(stored: list[dict[str, Any]]) -> str:
    """Return what the rows say together; every number and the verdict are counted."""
    total = sum(row["executions"] for row in stored)
    files = {name: sum(row["targets"].get(name, _NONE)["executions"] for row in stored) for name in TARGETS}
    seconds = {name: sum(row["seconds_per_target"] for row in stored if name in row["targets"]) for name in TARGETS}
    least, shortest = min(files, key=files.__getitem__), min(seconds.values())
    faults = [
        f"`{name}` at {row['revision']} ({result['fault']})"
        for row in stored
        for name, result in row["targets"].items()
        if result["fault"]
    ]
    verdict = "reached" if total >= PROMISED else f"not reached: {PROMISED - total:,} are missing"
    return (
        f"Stored runs: {len(stored)}, with {total:,} executions, the last by revision {stored[-1]['revision']}. Ten "
        f"million executions once: {verdict}. Each of {len(TARGETS)} targets ran for at least {shortest} s; the fewest "
        f"executions are {files[least]:,}, of `{least}`. Faults: {'; '.join(faults) or 'none'}.\n"
    )


_NONE: Mapping[str, Any] = {"executions": 0}


if __name__ == "__main__":
    main()
