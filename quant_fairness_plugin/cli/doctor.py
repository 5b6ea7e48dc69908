"""`quant-fairness doctor`: what this machine and environment can do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import typer

from quant_fairness_plugin.artifacts import package_versions
from quant_fairness_plugin.cli.options import Json
from quant_fairness_plugin.errors import QuantFairnessError

EXTRAS = {
    "datasets": "texts from Hugging Face datasets",
    "vl-convert-python": "report.html, extra report",
    "triton": "GPU kernels",
    "vllm": "serving (own environment)",
}


def doctor(as_json: Json = False) -> None:
    """Say what this environment can do: versions, bundled models, extras, memory and disk."""
    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for section, rows in facts.items():
        typer.echo(section)
        for name, value in rows.items():
            typer.echo(f"  {name:<20} {value}")


def gather() -> dict[str, dict[str, Any]]:
    """The facts as plain data, without importing torch."""
    from quant_fairness_plugin.model.resolve import BUNDLED

    return {
        "versions": package_versions(),
        "machine": {
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        },
        "bundled models": {name: _bundled(name) for name in BUNDLED},
        "extras": {name: _extra(name, purpose) for name, purpose in EXTRAS.items()},
    }


def _bundled(name: str) -> str:
    from quant_fairness_plugin.model.resolve import resolve_model

    try:
        files = resolve_model(name)
    except QuantFairnessError as err:
        return str(err)
    return f"ready, {files.layers} layers"


def _extra(name: str, purpose: str) -> str:
    try:
        return f"{importlib.metadata.version(name)} ({purpose})"
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({purpose})"
