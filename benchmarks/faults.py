"""Every command against every fault at every point where it touches the disk: what is left must always be right.

    python benchmarks/faults.py                            # every command: some minutes on a free core
    python benchmarks/faults.py --only report --no-row     # a quick look
    python benchmarks/faults.py --every 4                  # kills everywhere, of the other faults every fourth

The faults and what must hold after them are in `tests/faults`. Prints, and keeps, one row a command: how many points it
has, how many faults were tried, and how many of them left anything wrong. Exit status 1 if any did.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "faults.jsonl"


def main() -> None:
    options = parse_options()
    import torch

    from tests.faults.cases import CASES, Case, write_start
    from tests.faults.loop import open_trial, without_slow_readers

    torch.set_num_threads(1)  # a process with threads must not fork
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name, without_slow_readers():
        place = Path(name).resolve()
        (place / "start").mkdir()
        write_start(place / "start")
        warm_up([case for case in CASES if case.warms], place)

        def try_case(case: Case, folder: Path) -> int:
            started = time.monotonic()
            folder.mkdir()
            trial = open_trial(case, place / "start", folder)
            meets = trial.meets(every=options.every)
            found = [(number, action, problem) for number, action in meets for problem in trial.meet(number, action)]
            for number, action, problem in found:
                sys.stdout.write(f"{case.name}: {action} at {trial.expected.points[number - 1]}: {problem}\n")
            corrupt = len({(number, action) for number, action, _ in found})
            write_row(case.name, len(trial.expected.points), meets, corrupt, time.monotonic() - started, options)
            shutil.rmtree(folder)
            return corrupt

        for number, case in enumerate(case for case in CASES if options.only in case.name):
            wrong += try_case(case, place / str(number))
    sys.exit(wrong > 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="commands whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="of the faults other than kills, only every n-th")
    parser.add_argument("--no-row", action="store_true", help="print the rows, do not keep them")
    return parser.parse_args()


def warm_up(cases: list, place: Path) -> None:  # type: ignore[type-arg] # the type is imported late
    """Run commands once in this process, so that its children have everything imported."""
    import typer

    from quant_fairness_plugin.cli.main import app, run_guarded

    before = Path.cwd()
    for case in cases:
        folder = place / "warm"
        shutil.copytree(place / "start", folder)
        os.chdir(folder)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            for command in (*case.prepare, case.command):
                status = run_guarded(typer.main.get_command(app), list(command), "quant-fairness")
                assert status == 0, said.getvalue()
        os.chdir(before)
        shutil.rmtree(folder)


def write_row(
    name: str, points: int, meets: list[tuple[int, str]], corrupt: int, seconds: float, options: argparse.Namespace
) -> None:
    """Print a row, and keep it in place of an earlier one of the same command."""
    from rows import conditions

    from quant_fairness_plugin.artifacts import write_atomically

    actions = [action for _, action in meets]
    tried = {action: actions.count(action) for action in dict.fromkeys(actions)}
    faults = ", ".join(f"{count} {action}" for action, count in tried.items())
    sys.stdout.write(f"{name}: {points} points; {faults}: {corrupt} corrupt\n")
    sys.stdout.flush()
    if options.no_row:
        return
    row = {"case": name, "points": points, "faults": tried, "corrupt": corrupt, "seconds": round(seconds, 1)}
    row |= conditions(command=f"python benchmarks/faults.py --every {options.every}", seed=0)
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    kept = [line for line in lines if json.loads(line)["case"] != name]
    write_atomically(ROWS, "".join(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)]).encode())


if __name__ == "__main__":
    main()
