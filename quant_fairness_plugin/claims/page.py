"""The page of all claims, from stored rows. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quant_fairness_plugin.claims.figures import labelled, written
from quant_fairness_plugin.claims.ledger import HERE, ORIGINS, Claim, Ledger

DOCUMENTS = {
    "S0": "The tool (`quant-fairness/README.md`)",
    "S1": "GPU experiments (`gpu-experiments/README.md`)",
    "S2": "The main README",
    "S3": "The early README",
    "S4": "The paper page (`paper/index.md`)",
    "LOG": "The index of experiments 001 to 080",
}
MEANING = {"works": "a command answers it", "different": "done otherwise, for a reason", "lacks": "not at hand"}
Rows = Mapping[str, Mapping[str, Any]]


def tables(ledger: Ledger, rows: Rows) -> dict[str, str]:
    """Return name → Markdown of every generated part of the page.

    Args:
        ledger: the claims.
        rows: claim → its stored row.
    """
    lines = {name: [claim for claim in ledger.claims.values() if _document(claim) == name] for name in DOCUMENTS}
    parts = {"counts": _counts([claim for name, claims in lines.items() if name != "LOG" for claim in claims])}
    parts |= {name: _table(claims, rows) for name, claims in lines.items()}
    return parts | {"commands": _commands(ledger, rows)}


def _document(claim: Claim) -> str:
    return claim.id.partition("-")[0]


def _counts(claims: Sequence[Claim]) -> str:
    count = Counter((claim.here, claim.origin) for claim in claims)
    head = ["", *ORIGINS, "all"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for here in HERE:
        numbers = [count[here, origin] for origin in ORIGINS]
        lines.append(_line([f"{here}: {MEANING[here]}", *map(str, numbers), str(sum(numbers))]))
    numbers = [sum(count[here, origin] for here in HERE) for origin in ORIGINS]
    return "\n".join([*lines, _line(["all", *map(str, numbers), str(sum(numbers))]), ""])


def _table(claims: Sequence[Claim], rows: Rows) -> str:
    head = ["id", "claim", "seed", "legacy", "rigorous", "command, and what to bear in mind"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for claim in claims:
        row = rows.get(claim.id, {})
        seed = f"{claim.seed} ({claim.origin})" if claim.seed else "" if claim.origin == "statement" else claim.origin
        legacy = f"{written(row.get('legacy'))}<br>`{claim.legacy}`" if claim.legacy else ""
        rigorous = labelled(claim.path, row["rigorous"]) if row.get("rigorous") else ""
        note = "; ".join(filter(None, (claim.command and f"`{claim.command}`", _reason(claim))))
        lines.append(_line([claim.id, claim.says, seed, legacy, rigorous, note]))
    return "\n".join([*lines, ""])


def _reason(claim: Claim) -> str:
    if claim.here == "works":
        return claim.reason
    return f"**{claim.here}**: {claim.reason}"


def _commands(ledger: Ledger, rows: Rows) -> str:
    """Return the command lines by name, with the exit code and the time that the stored run took."""
    lines = [_line(["name", "`quant-fairness …`", "exit code", "seconds"]), "|---|---|---|---|"]
    for command in ledger.commands.values():
        row = next((row for row in rows.values() if row["answered_by"] == command.name), None)
        code, seconds = ("", "") if row is None else (str(row["exit_code"]), f"{row['seconds']:.0f}")
        lines.append(_line([command.name, f"`{command.line}`", code, seconds]))
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
