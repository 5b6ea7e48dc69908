"""Are layers at the same relative depth of two models worth the same? In docs/analyses.md.

    python benchmarks/depth_table.py measure en,he,ar,zh --others STUDENT SMOLLM2    # and the bundled models
    python benchmarks/depth_table.py render

STUDENT is that of trifecta_table.py, SMOLLM2 that of real_model.py, whose sweep takes longest.

A sweep of each model, then `analyze depth` on all of them. The row is replaced.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from commands import printed
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import SweepReport, load, write_atomically

ROWS = Path(__file__).parent / "results" / "cpu" / "depth.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "analyses.md"
MODELS = ("demo", "demo-gpt2")


def measure(langs: str, others: list[str]) -> dict[str, Any]:
    """Return the row: the answer, and which models it is about."""
    with tempfile.TemporaryDirectory() as work:
        models = [*MODELS, *others]
        sweeps = [Path(work) / f"{place}.json" for place in range(len(models))]
        for model, path in zip(models, sweeps, strict=True):
            printed("sweep", "--model", model, "--langs", langs, "-o", str(path))
        answer = json.loads(printed("analyze", "depth", "--sweep", ",".join(map(str, sweeps)), "--json"))
        known = [load(SweepReport, path).provenance for path in sweeps]
    names = [Path(folder).name for folder in others]
    command = " ".join(["python benchmarks/depth_table.py measure", langs, "--others", *names])
    row = {"models": {each.model: each.model_sha256 for each in known}} | answer["result"]
    return row | conditions(command=command, seed=answer["provenance"]["seed"])


def read_rows() -> list[dict[str, Any]]:
    """Return the stored row, or none."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return two tables: of the pairs, and of the gateway layers of each model."""
    if not (rows := read_rows()):
        return {"depth": "Not measured yet.\n"}
    (row,) = rows
    lines = ["| models | depths | Kendall's τ | p | order by depth |", "|---|---:|---:|---:|---|"]
    for pair in row["pairs"]:
        models = f"{pair['first']}, {pair['second']}"
        cells = [models, str(pair["depths"]), tau(pair["tau"]), number(pair["adjusted_p"]), pair["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    heads = ["model", "layers", "gateway layers", "each among the first", "they are the first", "by chance"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---:|---|---|---:|---:|"]
    for one in row["gateways"]:
        each = ", ".join(f"{share:.1%}" for share in one["among_first"])
        shares = [f"{one['all_first']:.1%}", f"{one['all_by_chance']:.1%}"]
        cells = [one["sweep"], str(one["layers"]), ", ".join(map(str, one["gateways"])), each, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return {"depth": "\n".join(lines) + "\n"}


def tau(figure: dict[str, Any]) -> str:
    """Return `0.58 [0.45, 0.76]`."""
    if "undefined" in figure:
        return f"undefined: {figure['undefined']}"
    return f"{figure['estimate']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def number(p_value: float | dict[str, str]) -> str:
    """Return a p-value, or that there is none."""
    return f"{p_value:.2g}" if isinstance(p_value, float) else "undefined"


def render() -> None:
    """Write the table into its page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Measure, or render what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("measure")
    one.add_argument("langs")
    one.add_argument("--others", nargs="*", default=[], help="folders of further models")
    commands.add_parser("render")
    given = parser.parse_args()
    if given.what == "measure":
        row = measure(given.langs, given.others)
        write_atomically(ROWS, f"{json.dumps(row, ensure_ascii=False)}\n".encode())
    render()


if __name__ == "__main__":
    main()
