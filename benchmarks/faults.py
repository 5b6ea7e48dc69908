"""Every command against every fault at every point where it touches the disk: what is left must always be right.

    python benchmarks/faults.py                            # every command: a quarter of an hour of a free core
    python benchmarks/faults.py --only report --no-row     # a quick look
    python benchmarks/faults.py --every 4                  # kills everywhere, of the other faults every fourth

    python benchmarks/faults.py render                     # the table of docs/reliability.md from the rows

The faults and what must hold after them are in `tests/faults`. Prints, and keeps, one row a command: how many points it
has, how many faults were tried, and how many of them left anything wrong. Exit status 1 if any did.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "faults.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
MEMORY = Path("/dev/shm")
"""Where flushing costs nothing: a kill of the process, which is what is tried, loses nothing that was written."""


def main() -> None:
    options = parse_options()
    if options.what == "render":
        return render()
    import torch

    from tests.faults.cases import CASES, Case, write_start
    from tests.faults.loop import open_trial, without_slow_readers

    torch.set_num_threads(1)  # a process with threads must not fork
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="faults-", dir=place_in_memory()) as name, without_slow_readers():
        place = Path(name).resolve()
        (place / "start").mkdir()
        write_start(place / "start")
        warm_up([case for case in CASES if case.warms], place)

        def try_case(case: Case, folder: Path) -> int:
            started = cpu_seconds()
            folder.mkdir()
            trial = open_trial(case, place / "start", folder)
            meets = trial.meets(every=options.every)
            found = [(number, action, problem) for number, action in meets for problem in trial.meet(number, action)]
            for number, action, problem in found:
                sys.stdout.write(f"{case.name}: {action} at {trial.points[number - 1]}: {problem}\n")
                sys.stdout.flush()
            corrupt = len({(number, action) for number, action, _ in found})
            counts = {"points": len(trial.points), "states": len(trial.known), "corrupt": corrupt}
            write_row(case.name, counts, meets, cpu_seconds() - started, options)
            shutil.rmtree(folder)
            return corrupt

        for number, case in enumerate(case for case in CASES if options.only in case.name):
            wrong += try_case(case, place / str(number))
    sys.exit(wrong > 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "render"), default="run")
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


def cpu_seconds() -> float:
    """Return what this process and its children have taken of the processor."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def place_in_memory() -> Path | None:
    return MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None


def write_row(
    name: str, counts: dict[str, int], meets: list[tuple[int, str]], seconds: float, options: argparse.Namespace
) -> None:
    """Print a row, and keep it in place of an earlier one of the same command."""
    from rows import conditions

    from quant_fairness_plugin.artifacts import write_atomically

    actions = [action for _, action in meets]
    tried = {action: actions.count(action) for action in dict.fromkeys(actions)}
    faults = ", ".join(f"{count} {action}" for action, count in tried.items())
    sys.stdout.write(f"{name}: {counts['points']} points; {faults}: {counts['corrupt']} corrupt\n")
    sys.stdout.flush()
    if options.no_row:
        return
    row = {"case": name, **counts, "faults": tried, "every": options.every, "cpu_seconds": round(seconds, 1)}
    row |= conditions(command=f"python benchmarks/faults.py --every {options.every}", seed=0)
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    kept = [line for line in lines if json.loads(line)["case"] != name]
    write_atomically(ROWS, "".join(f"{line}\n" for line in [*kept, json.dumps(row, ensure_ascii=False)]).encode())


def render() -> None:
    """Write the table into its page."""
    from pages import write_tables

    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["faults"]))
    lines = [
        f"| command | points | {' | '.join(kinds)} | states gone on from | left wrong |",
        f"|---|{'---:|' * (len(kinds) + 3)}",
    ]
    for row in rows:
        tried = [f"{row['faults'].get(kind, 0):,}" for kind in kinds]
        cells = [row["points"], *tried, row["states"], row["corrupt"]]
        lines.append(f"| `{row['case']}` | {' | '.join(map(str, cells))} |")
    total = sum(sum(row["faults"].values()) for row in rows)
    wrong, seconds = (sum(row[key] for row in rows) for key in ("corrupt", "cpu_seconds"))
    shares = sorted({row["every"] for row in rows})
    which = "every fault at every point" if shares == [1] else f"of the faults other than kills every {shares}th"
    said = f"{total:,} faults ({which}), {wrong} left anything wrong; {seconds / 60:.0f} minutes of the processor."
    write_tables(PAGE, {"faults": "\n".join([*lines, "", said]) + "\n"})


if __name__ == "__main__":
    main()
