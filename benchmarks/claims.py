"""Every claim of the research scripts on a bundled model: their figure by their rule, and ours by our command.

    python benchmarks/claims.py measure            # every claim, minutes on two idle cores; or the ids that follow
    python benchmarks/claims.py render             # rewrites the tables of docs/claims.md

Rows are written command after command, so that a run that was ended keeps what it found. `seconds` is the time of the
command that answers, on a machine that may have had other work.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commands import printed
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.claims.ledger import Claim, read_ledger
from quant_fairness_plugin.claims.page import tables as page_tables
from quant_fairness_plugin.claims.reproduction import Reproduction

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "claims.jsonl"
PAGE = ROOT / "docs" / "claims.md"
MODEL = "demo-gpt2"
SEED = 0


def measure(ids: Sequence[str]) -> None:
    """Run these claims, those of one command after another, and put their rows in place of their old ones."""
    from quant_fairness_plugin.claims.legacy import LegacyFigures
    from quant_fairness_plugin.model.load import load_model
    from quant_fairness_plugin.model.resolve import model_sha256, resolve_model
    from quant_fairness_plugin.plans.controls import gateway_layers

    files, ledger = resolve_model(MODEL), read_ledger()
    loaded = load_model(files, device="cpu")
    common = {"model": MODEL, "model_sha256": model_sha256(files)}
    common |= conditions(command="python benchmarks/claims.py measure", seed=SEED)
    order = list(ledger.commands)
    claims = sorted(ledger.chosen(ids), key=lambda claim: order.index(claim.command) if claim.command else -1)
    with tempfile.TemporaryDirectory() as work:
        layers = ",".join(map(str, gateway_layers(files.layers)))
        places = {"model": MODEL, "work": work, "gateways": layers}
        reproduction = Reproduction(ledger, lambda arguments: printed(*arguments), LegacyFigures(loaded), places)
        for claim in claims:
            sys.stderr.write(f"{claim.id}\n")
            store(row_of(claim, reproduction) | common)


def row_of(claim: Claim, reproduction: Reproduction) -> dict[str, Any]:
    finding = reproduction.reproduce(claim)
    return {
        "id": claim.id,
        "rule": claim.legacy,
        "legacy": finding.legacy if isinstance(finding.legacy, (float, list, type(None))) else asdict(finding.legacy),
        "answered_by": claim.command,
        "line": reproduction.ledger.commands[claim.command].line if claim.command else "",
        "path": claim.path,
        "rigorous": finding.rigorous,
        "exit_code": finding.exit_code,
        "error": finding.reason if finding.here == "failed" else "",
        "seconds": round(reproduction.seconds.get(claim.command, 0.0), 1),
    }


def store(row: dict[str, Any]) -> None:
    rows = read_rows() | {row["id"]: row}
    known = [rows[name] for name in read_ledger().claims if name in rows]
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in known).encode())


def read_rows() -> dict[str, dict[str, Any]]:
    if not ROWS.exists():
        return {}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def tables() -> dict[str, str]:
    return page_tables(read_ledger(), read_rows())


def render() -> None:
    write_tables(PAGE, tables())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("ids", nargs="*")
    given = parser.parse_args()
    if given.what == "measure":
        measure(given.ids)
    else:
        render()
