"""What `plan` says beforehand that a run takes, against what it took; and a search for a plan that has to keep a time.

    python benchmarks/forecast_table.py measure demo                                # some minutes on one core
    python benchmarks/forecast_table.py measure SmolLM2-135M --folder out/smollm2-135m
    python benchmarks/forecast_table.py measure SmolLM2-135M --folder out/smollm2-135m --only time
    python benchmarks/forecast_table.py render                                      # the tables of docs/planning.md

Every row is one command line in a process of its own with one thread, right behind the `plan` that it is compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from commands import ENTRY, one_thread, printed_apart
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "forecast_table.jsonl"
PAGE = ROOT / "docs" / "planning.md"
MODELS = {"demo": "en,fr,de", "demo-gpt2": "en,fr,de", "SmolLM2-135M": "en,zh"}
"""Model → languages."""
PLANNED, BARE, IN_TIME = "auto", "none", "time"
FORECASTS = {PLANNED: "run", BARE: "unplanned"}
"""What is run → the steps of `plan --json` that are about it."""
TIMES = {"demo": "60s", "demo-gpt2": "60s", "SmolLM2-135M": "3min"}
WITHIN = 1.5
SEED = 0
REFUSED = 2
"""Exit status of a value that cannot be kept."""


def measure(name: str, folder: str, kinds: list[str]) -> None:
    """Run kinds of a model and put their rows in place of the old ones."""
    for kind in kinds:
        row = in_time(name, folder) if kind == IN_TIME else run(name, folder, kind)
        others = [old for old in read_rows() if (old["model"], old["kind"]) != (name, kind)]
        order = [(model, each) for model in MODELS for each in (PLANNED, BARE, IN_TIME)]
        rows = sorted([*others, row], key=lambda row: order.index((row["model"], row["kind"])))
        write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        sys.stderr.write(f"{name} {kind}: {row['wall_seconds']} s, {row['cpu_seconds']} CPU s\n")


def run(name: str, folder: str, kind: str) -> dict[str, Any]:
    """Return the row of one quantization: forecast, wall and CPU seconds."""
    # gptqmodel and vLLM take the Conv1D of GPT-2 that Transformers' own reader does not.
    reader = ["--reader", "vllm"] if name == "demo-gpt2" else []
    said = json.loads(printed_apart("plan", "--model", folder, "--langs", MODELS[name], "--json"))
    steps = {step["name"]: [step["seconds"]["low"], step["seconds"]["high"]] for step in said[FORECASTS[kind]]}
    ends = [sum(seconds) for seconds in zip(*steps.values(), strict=True)]
    middle = math.sqrt(math.prod(ends))
    shared = said["speed"]["shared"]
    options = ["--langs", MODELS[name], "--protect-layers", kind, *reader]
    with tempfile.TemporaryDirectory() as scratch:
        took = timed("quantize", folder, *options, "-o", f"{scratch}/out", "--json")
    return {
        "model": name, "kind": kind, "forecast_seconds": [round(end, 1) for end in ends],
        "forecast_steps": {step: [round(second, 2) for second in seconds] for step, seconds in steps.items()},
        "shared": round(shared, 2), "wall_over_forecast": round(took["wall_seconds"] / middle, 3),
        # On a machine of its own the forecast would have been as much shorter as it says.
        "cpu_over_forecast": round(took["cpu_seconds"] * shared / middle, 3),
    } | took | conditions(command=shlex.join(["quant-fairness", "quantize", name, *options]), seed=SEED)  # fmt: skip


def in_time(name: str, folder: str) -> dict[str, Any]:
    """Return the row of a search that has to keep a time: how long the command took, and what it says.

    That is the reasons of its plan, or the line by which it refuses the time.
    """
    options = ["--langs", MODELS[name], "--max-overhead", "0.1", "--time", TIMES[name]]
    with tempfile.TemporaryDirectory() as scratch:
        plan, said = Path(scratch) / "plan.json", Path(scratch) / "stderr"
        with said.open("wb") as stderr:
            took = timed(
                "recommend", "--model", folder, *options, "-o", str(plan), stderr=stderr, accepted=(0, REFUSED)
            )
        reasons = said.read_text(encoding="utf-8").splitlines()[-1:]
        if plan.exists():
            reasons = json.loads(plan.read_text(encoding="utf-8"))["reasons"]
    command = shlex.join(["quant-fairness", "recommend", "--model", name, *options])
    row = {"model": name, "kind": IN_TIME, "time": TIMES[name], "reasons": reasons}
    return row | took | conditions(command=command, seed=SEED)


def timed(*line: str, stderr: IO[bytes] | None = None, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run a command; return its wall seconds, the CPU seconds of it and its children, and how busy the machine was."""
    busy, started = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", ENTRY, *line], stdout=subprocess.DEVNULL, stderr=stderr, cwd=ROOT, env=one_thread()
    )
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if os.waitstatus_to_exitcode(status) not in accepted:
        raise SystemExit(f"{shlex.join(line)}: status {os.waitstatus_to_exitcode(status)}")
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "load": [round(busy, 1), round(os.getloadavg()[0], 1)],
    }


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return the Markdown tables by name."""
    return {"forecast": forecasts(read_rows()), "search-time": searches(read_rows())}


def forecasts(rows: list[dict[str, Any]]) -> str:
    """Return forecast against run."""
    lines = [
        "| model | languages | `quantize --protect-layers` | forecast, s | other work then | wall s | CPU s | "
        "wall / forecast | CPU / forecast alone | load | revision |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row['model']} | {MODELS[row['model']]} | {row['kind']} | {_range(row['forecast_seconds'])} | "
        f"× {row['shared']:.1f} | {row['wall_seconds']:.0f} | {row['cpu_seconds']:.0f} | "
        f"{_ratio(row['wall_over_forecast'])} | {_ratio(row['cpu_over_forecast'])} | "
        f"{_range(row['load'], places=1)} | {row['revision']} |"
        for row in rows
        if row["kind"] != IN_TIME
    ]
    return "\n".join([*lines, ""])


def searches(rows: list[dict[str, Any]]) -> str:
    """Return searches in a stated time."""
    lines = [
        "| model | `--time` | wall s of the command | CPU s | load | what it says | revision |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in (row for row in rows if row["kind"] == IN_TIME):
        cut = "; ".join(reason for reason in row["reasons"] if f"time {row['time']}" in reason)
        lines.append(
            f"| {row['model']}, {MODELS[row['model']]} | {row['time']} | {row['wall_seconds']:.0f} | "
            f"{row['cpu_seconds']:.0f} | {_range(row['load'], places=1)} | {cut} | {row['revision']} |"
        )
    return "\n".join([*lines, ""])


def _range(values: list[float], *, places: int = 0) -> str:
    return " to ".join(f"{value:.{places}f}" for value in values)


def _ratio(value: float) -> str:
    """Return a ratio, in bold where it is outside of what is required."""
    return f"{value:.2f}" if 1 / WITHIN <= value <= WITHIN else f"**{value:.2f}**"


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("model", nargs="?", default="demo", choices=MODELS)
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--only", nargs="+", choices=(PLANNED, BARE, IN_TIME), default=[PLANNED, BARE])
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.model, given.folder or given.model, given.only)
    else:
        render()


if __name__ == "__main__":
    main()
