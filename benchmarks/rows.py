"""What every stored row says of how it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import quant_fairness_plugin


def conditions(*, command: str, seed: int) -> dict[str, Any]:
    """Return versions, revision of the code, machine, seed, command and time of a row."""
    from quant_fairness_plugin.artifacts import package_versions

    return {
        "versions": package_versions(),
        "revision": revision(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, {len(os.sched_getaffinity(0))} cores",
        "seed": seed,
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def revision() -> str:
    """Return the commit of the code that is imported, with `-dirty` where that code differs from it."""
    root = Path(quant_fairness_plugin.__file__).parents[1]
    commit = _git(root, "describe", "--always", "--exclude", "*")
    # Rows and pages change while they are measured; what they are measured with is the rest.
    changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=root, check=True).stdout.strip()
