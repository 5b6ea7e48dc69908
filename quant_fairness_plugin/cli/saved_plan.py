"""`--plan FILE`: a plan that `recommend -o` saved, in place of the options that choose one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quant_fairness_plugin.artifacts import ProtectionPlan, load
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError

PlanFile = Annotated[
    Path | None,
    typer.Option(
        help="A plan that `recommend -o` saved: its grid, layers and units, instead of the options for these."
    ),
]
_DEFAULTS = FairConfig()


def planned(path: Path | None, options: dict[str, Any]) -> tuple[ProtectionPlan | None, dict[str, Any]]:
    """The plan, and the options of a configuration that follows it.

    Args:
        path: the plan's file, or None, which leaves the options as they are.
        options: fields of `FairConfig` as given.

    Raises:
        ConfigError: an option that says something else than the plan.
        ArtifactError: no plan file.
    """
    if path is None:
        return None, options
    plan = load(ProtectionPlan, path)
    given = {name: options[name] for name in ("protect_units", "int8_layers") if options[name]}
    if options["protect_layers"] not in ("auto", "none"):
        given["protect_layers"] = options["protect_layers"]
    grid = {name: getattr(plan.grid, name) for name in ("bits", "group_size", "symmetric", "clip")}
    for name, value in grid.items():
        if options[name] not in (getattr(_DEFAULTS, name), value):
            given[name] = options[name]
    if given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"--{name.replace('_', '-')} {value} and --plan {path} both choose; leave one of them out")
    return plan, options | grid | {"protect_layers": plan.protected_layers or "none"}
