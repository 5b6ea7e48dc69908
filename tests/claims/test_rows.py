"""The stored run is that of the ledger as it is: the same commands, all of which ended well."""

from __future__ import annotations

import json
from pathlib import Path

from quant_fairness_plugin.claims.figures import labelled
from quant_fairness_plugin.claims.ledger import read_ledger

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "claims.jsonl"


def test_every_claim_has_a_command_that_ended_well_or_a_reason() -> None:
    ledger = read_ledger()
    rows = {row["id"]: row for row in map(json.loads, ROWS.read_text(encoding="utf-8").splitlines())}
    for claim in ledger.claims.values():
        if not claim.command:
            assert claim.reason, claim.id
            continue
        row = rows[claim.id]
        line = ledger.commands[claim.command].line
        assert (row["exit_code"], row["line"], row["path"]) == (0, line, claim.path), claim.id
        assert row["rule"] == claim.legacy, claim.id
        assert labelled(claim.path, row["rigorous"]), claim.id
