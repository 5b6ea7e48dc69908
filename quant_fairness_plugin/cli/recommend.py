"""`quant-fairness recommend`: the layers (or units) to protect, and nothing else on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import ProtectionPlan, SweepReport, load, save, to_json
from quant_fairness_plugin.cli.evidence import verified
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Json,
    Languages,
    ModelOption,
    ObjectiveOption,
    Reference,
    Revision,
    Seed,
    Strict,
    Texts,
    TrustRemoteCode,
    parse_languages,
    parse_reference,
    parse_weights,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import frontier_table, plan_list, show
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.recommend import Limit, recommend_plan
from quant_fairness_plugin.recommend.frontier import frontier_json, frontier_of
from quant_fairness_plugin.recommend.tools import Tool, check_tool, plan_for_tool

SEED_TOP = 3  # the seeds' default: `recommend` alone prints three indices


def recommend(
    report: Annotated[Path | None, typer.Argument(help="A saved sweep; without it the model is swept now.")] = None,
    model: ModelOption = None,
    top: Annotated[
        int | None, typer.Option(help="Exactly this many layers (or units). Default: 3, or the budget's choice.")
    ] = None,
    max_overhead: Annotated[
        float | None, typer.Option(help="The best for this budget: extra bytes over all-INT4, 0.2 = 20 %.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="The best for this budget: bytes of the checkpoint.")] = None,
    target: Annotated[
        float | None, typer.Option(help="The fewest bytes for this damage: KL in bits per byte, by --objective.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="How much each language counts for a budget or target, such as en=1,fi=2.")
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Print which evaluated plans are worth their bytes, and nothing else.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Evaluate the plan and its controls on other sentences; says if it helps.")
    ] = False,
    evidence: Annotated[Path | None, typer.Option(help="With --verify: save all its figures as JSON.")] = None,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    objective: ObjectiveOption = DEFAULTS.objective,
    seed: Seed = DEFAULTS.seed,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the plan as JSON.")] = None,
    as_: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Print the plan as the configuration of gptqmodel, llmcompressor, autoround, optimum or llama.cpp.",
        ),
    ] = None,
    as_json: Json = False,
    strict: Strict = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Print the layers to keep in 16 bit, as indices with commas between; for a sweep of units, as 3.down,5.qkv.

    What gets another precision is printed with it: 0,3:int8.
    """
    limited = _check_limits(top, max_overhead, max_bytes, target, weights)
    if as_ is not None and as_json:
        raise ConfigError("--as and --json exclude each other; give one, and --output to save the plan besides")
    if evidence is not None and not verify:
        raise ConfigError(f"--evidence {evidence} is what --verify finds; add --verify")
    tool = None if as_ is None else check_tool(as_)
    config = make_config(
        objective=objective,
        top=top if limited else SEED_TOP,
        max_overhead=DEFAULTS.max_overhead if max_overhead is None else max_overhead,
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
        seed=seed,
        strict=strict,
    )
    if report is not None:
        swept = load(SweepReport, report)
    else:
        swept = _sweep(ModelSource(require_model(model), revision, trust_remote_code, allow_pickle), config)
    if frontier:
        _print_frontier(swept, as_json=as_json)
        return
    share = config.max_overhead if max_bytes is None and target is None else None
    plan = recommend_plan(
        swept,
        Limit(max_bytes=max_bytes, target=target, max_overhead=share),
        objective=config.objective,
        top=config.top,
        weights=parse_weights(weights),
        strict=config.strict,
    )
    if verify and plan_list(plan):
        source = ModelSource(model or swept.provenance.model, revision, trust_remote_code, allow_pickle)
        plan = verified(plan, swept, source, config, evidence=evidence)
    if output is not None:
        save(plan, output)
    if as_json:
        typer.echo(to_json(plan), nl=False)
        return
    _say_why(plan, asked=config.top is not None)
    if tool is not None:
        source = ModelSource(model or plan.model, revision, trust_remote_code, allow_pickle)
        typer.echo(_for_tool(tool, plan, source, given=model is not None), nl=False)
        return
    if chosen := plan_list(plan):
        typer.echo(chosen)


def _check_limits(
    top: int | None, max_overhead: float | None, max_bytes: int | None, target: float | None, weights: str | None
) -> bool:
    """Whether a number of layers, a budget or a target was given."""
    given = {"--top": top, "--max-overhead": max_overhead, "--max-bytes": max_bytes, "--target": target}
    limits = [name for name, value in given.items() if value is not None]
    if len(limits) > 1:
        raise ConfigError(f"{' and '.join(limits)} exclude each other; give the number of layers, a budget or a target")
    if weights is not None and (top is not None or not limits):
        raise ConfigError(f"--weights {weights} count for a budget or a target; give --max-overhead, say")
    return bool(limits)


def _say_why(plan: ProtectionPlan, *, asked: bool) -> None:
    """The reasons on stderr: as a warning where the plan is shaky or empty, and where a program chose it."""
    if not plan.stable or not plan_list(plan):
        sys.stderr.write(f"warning: {'; '.join(plan.reasons)}\n")
    elif not asked:
        doubt = " (predicted until the plan itself is evaluated on the confirm part)" if plan.predicted else ""
        sys.stderr.write(f"note: {'; '.join(plan.reasons)}{doubt}\n")


def _print_frontier(swept: SweepReport, *, as_json: bool) -> None:
    found = frontier_of(swept)
    if as_json:
        typer.echo(frontier_json(found, swept), nl=False)
        return
    show(frontier_table(found))


def _for_tool(tool: Tool, plan: ProtectionPlan, source: ModelSource, *, given: bool) -> str:
    try:
        files = resolve_model(
            source.name,
            revision=source.revision,
            allow_pickle=source.allow_pickle,
            trust_remote_code=source.trust_remote_code,
        )
    except QuantFairnessError as err:
        if given:
            raise
        raise ConfigError(
            f"--as needs the names of the model's modules, and the report only says {source.name!r}, which is not "
            "found from here; name the model's folder with --model"
        ) from err
    return plan_for_tool(tool, plan, files, trust_remote_code=source.trust_remote_code)


def _sweep(source: ModelSource, config: FairConfig) -> SweepReport:
    preflight(source, config)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        return FairQuantizer.from_source(source, config, progress=shown).sweep()
