"""Claims, run: the seeds' rule and our command for each, and what both say. Imports no torch."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.claims.figures import find, labelled, written
from quant_fairness_plugin.claims.ledger import Claim, Ledger
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError

_logger = logging.getLogger(__name__)
Run = Callable[[list[str]], str]
"""Runs a command line of `quant-fairness` and returns its stdout; raises what the command raises."""


class Legacy(Protocol):
    """What makes the seeds' figures."""

    def figure(self, spec: str) -> Any:
        """Return the figure that a spec names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, and what came out here."""

    id: str
    says: str
    seed: str
    origin: str
    here: str
    legacy: Any
    """The seeds' figure, made again on this model by their rule; None where there is none."""
    rigorous: list[Any] | None
    """The answers of our command, where it has one and ran."""
    command: str
    exit_code: int | None
    """Of the command; None where there is none."""
    path: str
    """Where the answers were found."""
    reason: str

    @property
    def legacy_text(self) -> str:
        """The seeds' figure in a cell."""
        return "undefined" if isinstance(self.legacy, Undefined) else written(self.legacy)

    @property
    def rigorous_text(self) -> str:
        """Our answer in a cell, a line for each figure, or why there is none."""
        if self.rigorous is None:
            return f"{self.here}: {self.reason}"
        return labelled(self.path, self.rigorous, between="\n") if self.rigorous else "ran"


@dataclass(slots=True)
class Reproduction:
    """Runs claims of a ledger on one model, every command and every rule once."""

    ledger: Ledger
    run: Run
    legacy: Legacy
    places: Mapping[str, str]
    """What `{model}` and the like in a command line stand for."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Command → how long it took."""
    _answers: dict[str, str | QuantFairnessError] = field(default_factory=dict)

    def reproduce(self, claim: Claim) -> Finding:
        """Return what a claim comes to. A rule or a command that fails is a finding, too, with its message."""
        legacy = self._legacy_figure(claim.legacy) if claim.legacy else None
        code: int | None = None
        rigorous, reason, line = None, claim.reason, ""
        if claim.command:
            line, code = self.line(claim.command), 0
            try:
                rigorous = _read(self._answer(claim.command), claim.path)
            except QuantFairnessError as err:
                code, reason = err.exit_code, str(err)
        return Finding(
            id=claim.id,
            says=claim.says,
            seed=claim.seed,
            origin=claim.origin,
            here=claim.here if code in (None, 0) else "failed",
            legacy=legacy,
            rigorous=rigorous,
            command=line,
            exit_code=code,
            path=claim.path,
            reason=reason,
        )

    def line(self, name: str) -> str:
        """Return a command's line for this model."""
        return shlex.join(self._arguments(name))

    def _arguments(self, name: str) -> list[str]:
        arguments = shlex.split(self.ledger.commands[name].line)  # before a path with spaces is filled in
        for place, value in self.places.items():
            arguments = [argument.replace(f"{{{place}}}", value) for argument in arguments]
        return arguments

    def _legacy_figure(self, spec: str) -> Any:
        try:
            return self.legacy.figure(spec)
        except QuantFairnessError as err:
            return Undefined(str(err))

    def _answer(self, name: str) -> str:
        """Return the stdout of a command; raise again what it raised."""
        if name not in self._answers:
            for other in self.ledger.commands[name].after:
                self._answer(other)
            _logger.info("quant-fairness %s", self.line(name))
            begun = time.monotonic()
            try:
                stdout = self.run(self._arguments(name))
                self._answers[name] = stdout.replace(self.places["work"], "{work}")  # another folder every time
            except QuantFairnessError as err:
                self._answers[name] = err
            self.seconds[name] = time.monotonic() - begun
        answer = self._answers[name]
        if isinstance(answer, QuantFairnessError):
            raise answer
        return answer


def _read(stdout: str, path: str) -> list[Any]:
    """Return the answers in a JSON document; of other output, all of it where the path is `text`."""
    if path == "text":
        return [stdout.strip()]
    if not path:
        return []
    try:
        return find(json.loads(stdout), path)
    except json.JSONDecodeError as err:
        raise ConfigError("the command printed no JSON document; give it --json, or the path 'text'") from err
