"""The ledger: every line of the seeds is there, with a command that can be run or a reason why there is none."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import Any

import pytest
import typer

from quant_fairness_plugin.claims.ledger import Claim, parse_ledger, read_ledger
from quant_fairness_plugin.cli.main import app
from quant_fairness_plugin.errors import ConfigError

LINES = {"S0": 22, "S1": 21, "S2": 27, "S3": 19, "S4": 56}
"""How many lines each document of the seeds has."""
CLAIMS = list(read_ledger().claims.values())
PLACES = {"model": "demo-gpt2", "work": "folder", "gateways": "0,9,11"}


def test_every_line_of_the_seeds_has_a_record() -> None:
    expected = {f"{document}-{number}" for document, count in LINES.items() for number in range(1, count + 1)}
    assert len(expected) == 145
    assert {claim.id for claim in CLAIMS if not claim.id.startswith("LOG")} == expected


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_a_claim_has_a_command_or_a_reason(claim: Claim) -> None:
    assert claim.command or claim.reason
    assert bool(claim.command) == bool(claim.path)
    assert not claim.says.endswith(".")


@pytest.mark.parametrize("name", list(read_ledger().commands))
def test_a_command_is_one_that_the_program_takes(name: str) -> None:
    line = read_ledger().commands[name].line
    arguments = shlex.split(line.format(**PLACES))
    command = typer.main.get_group(app).commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])  # raises where an argument is wrong


def test_known_good_configurations_are_unverified() -> None:
    for name in ("S0-11", "S0-12"):
        claim = read_ledger().claims[name]
        assert (claim.here, claim.reason.partition(":")[0]) == ("different", "unverified here")


def test_every_command_is_needed() -> None:
    ledger = read_ledger()
    used = Counter(claim.command for claim in CLAIMS)
    needed = {other for command in ledger.commands.values() for other in command.after}
    assert set(ledger.commands) <= set(used) | needed


GOOD = {"id": "S0-1", "says": "x", "origin": "typed", "here": "works", "command": "run", "path": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": "guessed"}, "has the origin 'guessed'"),
        ({"here": "maybe"}, "has the outcome 'maybe'"),
        ({"command": "fly"}, "names the command 'fly'"),
        ({"command": ""}, "has neither a command nor a reason"),
        ({"command": "", "reason": "r"}, "works without a command"),
        ({"here": "lacks"}, "gives no reason"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    document = {"commands": {"run": {"line": "run"}}, "claims": [GOOD | change]}
    with pytest.raises(ConfigError, match=f"claim S0-1 {message}"):
        parse_ledger(document)


def test_an_id_twice_or_unknown_is_an_error() -> None:
    document = {"commands": {"run": {"line": "run"}}, "claims": [GOOD, GOOD]}
    with pytest.raises(ConfigError, match="claim S0-1 is there twice"):
        parse_ledger(document)
    with pytest.raises(ConfigError, match="there is no claim 'S9-1'; ids are S0-1 to S4-56"):
        read_ledger().chosen(["S0-1", "S9-1"])
