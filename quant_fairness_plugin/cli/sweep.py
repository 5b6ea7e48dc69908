"""`quant-fairness sweep`: which layers, or units of layers, matter for which language."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import Undefined, save, save_run_record, to_json
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Bits,
    Combine,
    ExecutorOption,
    GranularityOption,
    GroupSize,
    Json,
    Languages,
    MaxPlans,
    Mode,
    ModelOption,
    ObjectiveOption,
    Reference,
    Revision,
    Seed,
    Symmetric,
    Texts,
    TrustRemoteCode,
    Work,
    Workers,
    parse_combine,
    parse_executor,
    parse_granularity,
    parse_integer,
    parse_languages,
    parse_modes,
    parse_reference,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import combination_lines, show, sweep_table, unit_list
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.sweep.plans import MOST_COMBINATIONS, check_plans


def sweep(
    model: ModelOption = None,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    mode: Mode = "protect-one",
    granularity: GranularityOption = "layer",
    combine: Combine = "1",
    max_plans: MaxPlans = MOST_COMBINATIONS,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    objective: ObjectiveOption = DEFAULTS.objective,
    top: Annotated[int, typer.Option(help="How many layers or units the stability figures are about.")] = 3,
    work: Work = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    seed: Seed = DEFAULTS.seed,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the report as JSON.")] = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure every layer's or unit's part in the damage, language by language, and rank them."""
    chosen, size, where = parse_granularity(granularity), parse_combine(combine), parse_executor(executor)
    if where in {None, "local"} and workers is not None:
        raise ConfigError(f"--workers {workers} is for --executor processes or ray. Name one, or leave it out.")
    config = make_config(
        bits=parse_integer("bits", bits),
        group_size=parse_integer("group-size", group_size),
        symmetric=sym,
        objective=objective,
        top=top if chosen == "layer" else None,
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
        seed=seed,
    )
    modes = parse_modes(mode)
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    files, _ = preflight(source, config)
    if chosen == "layer":
        check_plans(modes, [f"layers.{layer}" for layer in range(files.layers)], size)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.sweep.executors import make_executor

    runner = None if where is None else make_executor(where, workers=workers)
    started = time.monotonic()
    with progress() as shown:
        report = FairQuantizer.from_source(source, config, progress=shown).sweep(
            modes,
            granularity=chosen,
            combine=size,
            max_plans=max_plans,
            top=top,
            work=work,
            executor=runner,
        )
    if output is not None:
        save(report, output)
        save_run_record(output, seconds=time.monotonic() - started, device="cpu", argv=sys.argv)
    counts = combination_lines(report, config.objective)
    if as_json:
        typer.echo("\n".join(counts), err=True)
        typer.echo(to_json(report), nl=False)
        return
    show(sweep_table(report, config.objective))
    typer.echo("\n".join(counts))
    for first in modes:
        ranking = report.rankings[f"{first} {config.objective}"]
        if isinstance(ranking, Undefined):
            typer.echo(f"{first}: {chosen}s cannot be ranked by {config.objective}: {ranking.undefined}")
            continue
        verdict = "stable" if ranking.stable else "unstable"
        typer.echo(f"{first}, most worth protecting first: {unit_list(ranking.units)} ({verdict}: {ranking.reason})")
