"""The records of `claims.toml`. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from quant_fairness_plugin.errors import ConfigError

Origin = Literal["measured", "unsaved", "simulated", "typed", "statement"]
"""How a figure came about there: a model's, with its output stored; a model's, printed and not stored; of synthetic
data; written by hand; or none, as the line is no figure."""
ORIGINS: tuple[Origin, ...] = get_args(Origin)
Here = Literal["works", "different", "lacks"]
"""What became of it: a command answers it; it is done otherwise, for a reason; it needs what is not at hand."""
HERE: tuple[Here, ...] = get_args(Here)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command line of `quant-fairness`, run once however many claims it answers."""

    name: str
    line: str
    """Arguments; `{model}`, `{work}` (a folder for files) and `{gateways}` (three layers) are filled in."""
    after: tuple[str, ...] = ()
    """Commands whose files it reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of the seeds."""

    id: str
    says: str
    origin: Origin
    here: Here
    seed: str = ""
    """Its figure, as printed there."""
    legacy: str = ""
    """`RULE | TEXTS | FIGURE`: how the seeds' figure is made, for `claims.legacy`."""
    command: str = ""
    path: str = ""
    """Where the answer is in the command's JSON; several with `;` between."""
    reason: str = ""
    """Why it is different, or what it lacks; what to bear in mind where it works."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """All records, and the commands that they name."""

    claims: Mapping[str, Claim]
    commands: Mapping[str, Command]

    def chosen(self, ids: Sequence[str]) -> tuple[Claim, ...]:
        """Return the claims of these ids, all where there are none.

        Raises:
            ConfigError: an id that the ledger does not have.
        """
        if unknown := [name for name in ids if name not in self.claims]:
            raise ConfigError(
                f"there is no claim {unknown[0]!r}; ids are S0-1 to S4-56 and LOG-001 to LOG-080 (reproduce --list)"
            )
        return tuple(self.claims[name] for name in ids) if ids else tuple(self.claims.values())


@cache
def read_ledger() -> Ledger:
    """Return the ledger of the package.

    Raises:
        ConfigError: a record that contradicts itself.
    """
    text = files("quant_fairness_plugin.claims").joinpath("claims.toml").read_text(encoding="utf-8")
    return parse_ledger(tomllib.loads(text))


def parse_ledger(document: Mapping[str, Any]) -> Ledger:
    """Return the ledger that a document describes.

    Raises:
        ConfigError: an unknown origin, outcome or command, an id twice, or a claim with neither a command nor a reason.
    """
    commands = {
        name: Command(name=name, line=record["line"], after=tuple(record.get("after", ())))
        for name, record in document["commands"].items()
    }
    claims: dict[str, Claim] = {}
    for record in document["claims"]:
        claim = Claim(**record)
        _check(claim, claims, commands)
        claims[claim.id] = claim
    return Ledger(claims, commands)


def _check(claim: Claim, known: Mapping[str, Claim], commands: Mapping[str, Command]) -> None:
    problems = {
        "is there twice": claim.id in known,
        f"has the origin {claim.origin!r}": claim.origin not in ORIGINS,
        f"has the outcome {claim.here!r}": claim.here not in HERE,
        f"names the command {claim.command!r}, which is not there": claim.command not in {"", *commands},
        "has neither a command nor a reason": not (claim.command or claim.reason),
        "works without a command": claim.here == "works" and not claim.command,
        "gives no reason": claim.here != "works" and not claim.reason,
    }
    if wrong := [problem for problem, there in problems.items() if there]:
        raise ConfigError(f"claim {claim.id} {wrong[0]}; correct claims.toml")
