"""`quant-fairness recommend`: the layers (or units) to protect, and nothing else on stdout."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import ProtectionPlan, SweepReport, load, save, to_json
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.evidence import verified
from quant_fairness_plugin.cli.imatrix import write_importance
from quant_fairness_plugin.cli.legacy import check_legacy, legacy_recommend
from quant_fairness_plugin.cli.options import COMPUTE, TEXTS, Access, Json, ModelOption, OutputFile
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.recommend_options import BUDGETS, MADE, SEED_TOP, Limits, Printed
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import frontier_table, plan_list, show
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.parsers import read_target
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.plans.costs import bytes_at_bits
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.recommend.frontier import frontier_json, frontier_of
from quant_fairness_plugin.recommend.tools import plan_for_tool

_CONFIG = (
    "objective", *TEXTS, *COMPUTE, "exhaustive", "time", "sentences", "strict", *BUDGETS, "limits", *MADE,
)  # fmt: skip


@options(config=_CONFIG, file=False)
def recommend(
    config: FairConfig,
    limits: Limits,
    printed: Printed,
    access: Access,
    report: Annotated[Path | None, typer.Argument(help="A saved sweep; without it the model is swept now.")] = None,
    model: ModelOption = None,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Print the layers to keep in 16 bit, as indices with commas between; for a sweep of units, as 3.down,5.qkv.

    What gets another precision is printed with it: 0,3:int8. A budget or a target without a saved sweep scores units by
    gradients; the model is swept for a number of layers, for --weights, --verify and --frontier, and with --exhaustive.
    """
    if printed.as_ is not None and as_json:
        raise ConfigError("--as and --json exclude each other; give one, and --output to save the plan as well")
    limits.check(config)
    if limits.method == "legacy":
        budget = [name for name in limits.given(config) if name != "--top"]
        check_legacy(config, report=report, printed=printed != Printed(), **dict.fromkeys(budget, True))
        legacy_recommend(access.source(model), config, limits.top or SEED_TOP, output=output, as_json=as_json)
        return
    by_scores = limits.by_scores(config, printed, saved=report is not None)
    config = limits.within(config)
    if by_scores:
        plan = _plan_by_scores(access.source(model), config)
    else:
        swept = _sweep(access.source(model), config) if report is None else load(SweepReport, report)
        if printed.frontier:
            _print_frontier(swept, as_json=as_json)
            return
        plan = _plan_by_sweep(swept, config, limits)
        if printed.verify and plan_list(plan):
            source = access.source(model or swept.provenance.model)
            plan = verified(plan, swept, source, config, evidence=printed.evidence)
    if output is not None:
        save(plan, output)
    if as_json:
        typer.echo(to_json(plan), nl=False)
        return
    _say_why(plan, by_number=config.top is not None)
    if printed.as_ is not None:
        source = access.source(model or plan.model)
        typer.echo(_for_tool(printed, plan, source, config, given=model is not None), nl=False)
    elif units := plan_list(plan):
        typer.echo(units)


def _plan_by_sweep(swept: SweepReport, config: FairConfig, limits: Limits) -> ProtectionPlan:
    return recommend_plan(
        swept,
        _limit_of(swept, config),
        objective=config.decides_by,
        top=config.top,
        weights=limits.weights,
        strict=config.strict,
    )


def _limit_of(swept: SweepReport, config: FairConfig) -> Limit:
    """Return what bounds a plan; as `planning.limit_of`, which takes a model."""
    languages, size = config.limits or {}, config.max_size
    if config.target is not None:
        return Limit(target=read_target(config.target)[1], languages=languages)
    if config.target_bits is not None:
        size = bytes_at_bits(swept.layer_bytes, swept.other_bytes, config.target_bits)
    if size is not None:
        return Limit(max_bytes=size, languages=languages)
    return Limit(max_overhead=config.max_overhead, languages=languages)


def _say_why(plan: ProtectionPlan, *, by_number: bool) -> None:
    """Write the reasons to stderr: as a warning where the plan is shaky or empty, and where a budget decided."""
    if not plan.stable or not plan_list(plan):
        say(f"warning: {'; '.join(plan.reasons)}", err=True)
    elif not by_number:
        doubt = " (predicted until the plan itself is evaluated on the confirm part)" if plan.predicted else ""
        say(f"note: {'; '.join(plan.reasons)}{doubt}", err=True)


def _print_frontier(swept: SweepReport, *, as_json: bool) -> None:
    frontier = frontier_of(swept)
    if as_json:
        typer.echo(frontier_json(frontier, swept), nl=False)
        return
    show(frontier_table(frontier))


def _for_tool(printed: Printed, plan: ProtectionPlan, source: ModelSource, config: FairConfig, *, given: bool) -> str:
    """Return the plan in a tool's words; for llama.cpp also write the importance matrix, where one is asked for."""
    assert printed.as_ is not None
    try:
        files = source.resolve()
    except QuantFairnessError as err:
        if given:
            raise
        raise ConfigError(
            f"--as needs the names of the model's modules, and the report only says {source.name!r}, which is not "
            "at hand here; name the model's folder with --model"
        ) from err
    text = plan_for_tool(printed.as_, plan, files, trust_remote_code=source.trust_remote_code)
    if printed.imatrix is None:
        return text
    write_importance(printed.imatrix, plan, source, config)
    return f"--imatrix {shlex.quote(str(printed.imatrix))}\n{text}"


def _sweep(source: ModelSource, config: FairConfig) -> SweepReport:
    checked = preflight(source, config)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, checked=checked, progress=shown)
        return quantizer.sweep(granularity="unit" if config.exhaustive else "layer", precisions=config.menu)


def _plan_by_scores(source: ModelSource, config: FairConfig) -> ProtectionPlan:
    """Return the plan that a run would take, which sweeps where the configuration asks for it."""
    checked = preflight(source, config)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        return FairQuantizer.from_source(source, config, checked=checked, progress=shown).recommend()
