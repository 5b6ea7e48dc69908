"""Which figures of the languages go with their damage, on the bundled models and a public one, in docs/analyses.md.

    python benchmarks/hypotheses_table.py measure demo en,de,fr,es,ru,he,ar,zh,ja,ko,vi,fi
    python benchmarks/hypotheses_table.py measure SmolLM2-135M en,de,fr,es,ru,he,ar,zh,ja,ko,vi,fi,hi,tr --folder DIR
    python benchmarks/hypotheses_table.py render

`analyze hypotheses` on all layers rounded to nearest. The row of the same model is replaced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from commands import printed
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically

ROWS = Path(__file__).parent / "results" / "cpu" / "hypotheses.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "analyses.md"
LEFT_OUT = ("without_a_family",)
"""Of a claim: long, and not in the table."""


def measure(model: str, folder: str | None, langs: str) -> dict[str, Any]:
    """Return the row of a model."""
    answer = json.loads(printed("analyze", "hypotheses", folder or model, "--langs", langs, "--json"))
    result = answer["result"]
    claims = [{name: value for name, value in row.items() if name not in LEFT_OUT} for row in result["claims"]]
    command = f"python benchmarks/hypotheses_table.py measure {model} {langs}{' --folder DIR' * (folder is not None)}"
    row = {"model": model, "model_sha256": answer["provenance"]["model_sha256"], "languages": langs.split(",")}
    row |= {"state": result["state"], "claims": claims}
    return row | conditions(command=command, seed=answer["provenance"]["seed"])


def store(row: dict[str, Any]) -> None:
    """Put a row in place of that of the same model."""
    rows = [old for old in read_rows() if old["model"] != row["model"]] + [row]
    write_atomically(ROWS, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows).encode())


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows, in the order in which they were measured."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return the table: a line for each figure, a column for each model."""
    rows = read_rows()
    if not rows:
        return {"hypotheses": "Not measured yet.\n"}
    heads = [f"{row['model']}, {len(row['languages'])} languages" for row in rows]
    lines = [f"| figure | research, abs. ρ | {' | '.join(heads)} |", f"|---|---|{'---|' * len(rows)}"]
    for place, claim in enumerate(rows[0]["claims"]):
        cells = [cell(row["claims"][place]) for row in rows]
        lines.append(f"| {claim['figure']} | {claim['claimed']} | {' | '.join(cells)} |")
    return {"hypotheses": "\n".join(lines) + "\n"}


def cell(claim: dict[str, Any]) -> str:
    """Return `0.61 [0.02, 0.90], p = 0.04: undecided`."""
    rho = claim["rho"]
    if "undefined" in rho:
        return f"undefined: {rho['undefined']}"
    p = claim["permutation_p"]
    sure = f", p = {p:.2g}" if isinstance(p, float) else ""
    return f"{rho['estimate']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]{sure}: {claim['verdict']}"


def render() -> None:
    """Write the table into its page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Measure a model, or render what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("measure")
    one.add_argument("model", help="its name in the row")
    one.add_argument("langs")
    one.add_argument("--folder", help="where it lies; default: what has that name")
    commands.add_parser("render")
    given = parser.parse_args()
    if given.what == "measure":
        store(measure(given.model, given.folder, given.langs))
    render()


if __name__ == "__main__":
    main()
