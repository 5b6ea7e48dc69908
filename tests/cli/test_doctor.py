"""`doctor` says what works, and for everything else the command; it knows every extra that there is."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer

from quant_fairness_plugin.cli import doctor
from quant_fairness_plugin.cli.main import app, run_guarded

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*arguments: str) -> int:
    return run_guarded(typer.main.get_command(app), ["doctor", *arguments], "quant-fairness")


def test_every_extra_is_known_with_packages_that_it_installs() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"dev"}

    def installed(extra: str) -> set[str]:
        names = {re.split(r"[\s=<>;]", requirement)[0] for requirement in extras[extra]}
        inner = {name[len("quant-fairness[") : -1] for name in names if name.startswith("quant-fairness[")}
        return names.union(*map(installed, inner))

    assert all(set(packages) <= installed(extra) for extra, (packages, _) in doctor.EXTRAS.items())


def test_what_is_missing_has_its_command_and_what_works_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "ray" else "1.0")
    assert run("--json") == 0
    extras = {row["name"]: row for row in json.loads(capsys.readouterr().out)["extras"]}
    assert not extras["ray"]["works"]
    assert re.fullmatch(r'pip install torch==[\d.]+ "quant-fairness\[ray\]"', extras["ray"]["command"])
    assert extras["report"] == {"name": "report", "works": True, "detail": doctor.EXTRAS["report"][1], "command": ""}


def test_it_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("quant-fairness ")
    assert {"Works here", "Readers", "Extras"} < set(lines)
    assert any(re.match(r"  ✓ transformers +runs in this Python", line) for line in lines)
    assert [line for line in lines if len(line) > 80 and "pip install" not in line] == []
