"""`--plan FILE`: a plan that `recommend -o` saved, or a checkpoint's, in place of the options that select one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import RECORD_NAME, ExportRecord, ProtectionPlan, load
from quant_fairness_plugin.cli.options import GRID
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError

PlanFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A plan that `recommend -o` saved, or a checkpoint folder: its grid, layers and units, instead of the "
        "options for these.",
        rich_help_panel="What to protect",
    ),
]
_DEFAULTS = FairConfig()
SELECTING = ("protect_units", "int8_layers", "time", "sentences")
"""What has no say beside a plan, wherever it is given."""


def planned(path: Path | None, config: FairConfig) -> tuple[ProtectionPlan | None, FairConfig]:
    """Return the plan, and a configuration that follows it.

    Args:
        path: the plan's file, a checkpoint's record or its folder; None leaves the configuration as it is.
        config: the configuration without the plan.

    Raises:
        ConfigError: a configuration that says something else than the plan.
        ArtifactError: not a plan file.
    """
    if path is None:
        return None, config
    plan = _read(path)
    if config.clip is None and config.grid.clip == "absmax":  # AWQ and other tools set ranges by rules of their own
        plan = replace(plan, grid=replace(plan.grid, clip="absmax"))
    given = {name: getattr(config, name) for name in SELECTING if getattr(config, name)}
    if config.protect_layers not in ("auto", "none"):
        given["protect_layers"] = config.protect_layers
    # Floats have a group size of their own, which is no choice.
    chosen = ("scheme", "bits", "clip") if plan.grid.scheme != "int" else (*GRID, "clip")
    grid = {name: getattr(plan.grid, name) for name in chosen}
    for name, value in grid.items():
        if getattr(config, name) not in (getattr(_DEFAULTS, name), value):
            given[name] = getattr(config, name)
    if given:
        name, value = next(iter(given.items()))
        raise ConfigError(
            f"--{name.replace('_', '-')} {value} and --plan {path} contradict each other; leave one of them out"
        )
    return plan, replace(config, **grid, protect_layers=plan.protected_layers or "none")


def _read(path: Path) -> ProtectionPlan:
    record = path / RECORD_NAME
    if record.is_file() or path.name == RECORD_NAME:
        return load(ExportRecord, record if record.is_file() else path).plan
    return load(ProtectionPlan, path)
