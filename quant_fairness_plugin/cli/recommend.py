"""`quant-fairness recommend`: the layers (or units) to protect, and nothing else on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import ProtectionPlan, SweepReport, load, save, to_json
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
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import layer_list, unit_list
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.export.plan_formats import Tool, check_tool, plan_for_tool
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.recommend import recommend_plan

SEED_TOP = 3  # the seeds' default: `recommend` alone prints three indices


def recommend(
    report: Annotated[Path | None, typer.Argument(help="A saved sweep; without it the model is swept now.")] = None,
    model: ModelOption = None,
    top: Annotated[
        int | None, typer.Option(help="Exactly this many layers (or units). Default: 3, or the budget's choice.")
    ] = None,
    max_overhead: Annotated[
        float | None, typer.Option(help="As many as this budget allows: extra bytes over all-INT4, 0.2 = 20 %.")
    ] = None,
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
    """Print the layers to keep in 16 bit, as indices with commas between; for a sweep of units, as 3.down,5.qkv."""
    if top is not None and max_overhead is not None:
        raise ConfigError("--top and --max-overhead exclude each other; give the number of layers or the budget")
    if as_ is not None and as_json:
        raise ConfigError("--as and --json exclude each other; give one, and --output to save the plan besides")
    tool = None if as_ is None else check_tool(as_)
    config = make_config(
        objective=objective,
        top=SEED_TOP if top is None and max_overhead is None else top,
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
    plan = recommend_plan(
        swept, objective=config.objective, top=config.top, max_overhead=config.max_overhead, strict=config.strict
    )
    if output is not None:
        save(plan, output)
    if as_json:
        typer.echo(to_json(plan), nl=False)
        return
    units = [name for name, precision in plan.overrides.items() if precision == "fp16"]
    chosen = layer_list(plan.protected_layers) or unit_list(units)
    if not plan.stable or not chosen:
        sys.stderr.write(f"warning: {'; '.join(plan.reasons)}\n")
    if tool is not None:
        source = ModelSource(model or plan.model, revision, trust_remote_code, allow_pickle)
        typer.echo(_for_tool(tool, plan, source, given=model is not None), nl=False)
        return
    if chosen:
        typer.echo(chosen)


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
