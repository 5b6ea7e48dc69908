"""The workflows of the forge: least permissions, actions pinned by commit, and nothing of a pull request in a shell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WRITES = {"release.yml": {"id-token", "attestations"}}
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_there_are_workflows() -> None:
    assert {path.name for path in WORKFLOWS} == {"ci.yml", "release.yml", "versions.yml"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_reads_and_writes_only_what_it_is_listed_for(path: Path) -> None:
    content = read(path)
    assert content["permissions"] == {"contents": "read"}
    granted = [job.get("permissions", {}) for job in content["jobs"].values()]
    assert {name for one in granted for name, kind in one.items() if kind == "write"} == WRITES.get(path.name, set())
    assert all("timeout-minutes" in job for job in content["jobs"].values())
    assert "pull_request_target" not in content[True]  # YAML 1.1 reads the key `on` as true


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_keep_no_credentials(path: Path) -> None:
    used = [step for step in steps(path) if "uses" in step]
    assert [step["uses"] for step in used if not PINNED.fullmatch(step["uses"])] == []
    checkouts = [step for step in used if step["uses"].startswith("actions/checkout@")]
    assert checkouts != []
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_shell_is_given_targets_of_the_makefile_and_no_expressions(path: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in (step["run"] for step in steps(path) if "run" in step):
        assert "${{" not in command
        program, *words = command.split()
        assert program == "make"
        assert {word for word in words if "=" not in word} <= set(targets)
