"""`quant-fairness sweep`: which layers, or units of layers, matter for which language."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.artifacts import SweepReport, Undefined, precision_of_bits, save, save_run_record, to_json
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Also,
    BankOption,
    BeamWidth,
    Bits,
    Combine,
    Dtype,
    ExecutorOption,
    GranularityOption,
    GroupSize,
    Json,
    Languages,
    MaxPlans,
    MemoryBudget,
    Mode,
    ModelOption,
    ObjectiveOption,
    Precisions,
    Reference,
    Revision,
    SearchOption,
    Seed,
    SetSize,
    Symmetric,
    Texts,
    TrustRemoteCode,
    Work,
    Workers,
    parse_also,
    parse_combine,
    parse_dtype,
    parse_executor,
    parse_granularity,
    parse_integer,
    parse_languages,
    parse_modes,
    parse_precisions,
    parse_reference,
    parse_search,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import (
    around_table,
    combination_lines,
    necessity_lines,
    show,
    sweep_table,
    synergy_tables,
    unit_list,
)
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.plans.plan_set import MOST_COMBINATIONS, check_plans, check_precisions
from quant_fairness_plugin.plans.units import check_around, name_units
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.sweep.bank_rules import check_bank
from quant_fairness_plugin.sweep.memory import check_budget, parse_size


def sweep(
    model: ModelOption = None,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    mode: Mode = "protect-one",
    granularity: GranularityOption = "layer",
    precisions: Precisions = "fp16",
    combine: Combine = "1",
    search: SearchOption = None,
    size: SetSize = 3,
    width: BeamWidth = 4,
    max_plans: MaxPlans = MOST_COMBINATIONS,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    objective: ObjectiveOption = DEFAULTS.objective,
    top: Annotated[int, typer.Option(help="How many layers or units the stability figures are about.")] = 3,
    also: Also = None,
    bank: BankOption = None,
    dtype: Dtype = "float32",
    work: Work = None,
    executor: ExecutorOption = None,
    workers: Workers = None,
    memory_budget: MemoryBudget = None,
    seed: Seed = DEFAULTS.seed,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the report as JSON.")] = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure every layer's or unit's part in the damage, language by language, and rank them."""
    chosen, most, where = parse_granularity(granularity), parse_combine(combine), parse_executor(executor)
    compute = parse_dtype(dtype)
    kinds, looked = parse_precisions(precisions), parse_search(search, size=size, width=width, objective=objective)
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
    check_precisions(kinds, modes, precision_of_bits(config.bits))
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    files, _ = preflight(source, config)
    besides = parse_also(also)
    _check_sources(files, config, bank, besides, alone=memory_budget is None and kinds == ("fp16",))
    budget = _budget(memory_budget, executor, files, precisions=len({*kinds, config.bits} - {"fp16"}))
    if chosen == "layer":
        check_plans(modes, [f"layers.{layer}" for layer in range(files.layers)], most)
        if looked is not None:
            looked.check(files.layers)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.sweep.make_executor import make_executor

    runner = None if where is None else make_executor(where, workers=workers)
    started = time.monotonic()
    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, progress=shown, memory_budget=budget, dtype=compute)
        report = quantizer.sweep(
            modes,
            granularity=chosen,
            precisions=kinds,
            combine=most,
            search=looked,
            max_plans=max_plans,
            top=top,
            also=besides,
            bank=bank,
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
    if bank is not None:
        typer.echo(f"quantized weights: {report.provenance.arguments['bank']}")
    if report.around:
        show(around_table(report, config.objective))
    typer.echo("\n".join(counts))
    for table in synergy_tables(report, config.objective):
        show(table)
    _say(report, config.objective)


def _check_sources(
    files: ModelFiles, config: FairConfig, bank: Path | None, also: tuple[str, ...], *, alone: bool
) -> None:
    """Refuse a bank that is not one of this model, and units around the layers that it does not have."""
    if bank is not None:
        if also or not alone:
            raise ConfigError(
                "--bank goes without --memory-budget, --precisions and --also: a checkpoint has one precision, and "
                "what is around its layers is 16 bit. Leave one of them out."
            )
        check_bank(bank, files, config.grid)
    if also:
        outline = outline_model(files)
        units = name_units(outline.family, outline.layers, outline.shapes)
        check_around(also, units, outline.shapes, config.grid)


def _budget(text: str | None, executor: str | None, files: ModelFiles, *, precisions: int) -> int | None:
    """The memory budget in bytes, checked against the headers of the model's files."""
    if text is None:
        return None
    if executor is not None:
        raise ConfigError(
            f"--memory-budget {text} and --executor {executor} do not go together: each trial of an executor takes the "
            "whole model. Leave one of them out."
        )
    size = parse_size(text)
    check_budget(outline_model(files), size, precisions=precisions)
    return size


def _say(report: SweepReport, objective: str) -> None:
    for line in necessity_lines(report, objective):
        typer.echo(line)
    for mode in report.modes:
        ranking = report.rankings[f"{mode} {objective}"]
        if isinstance(ranking, Undefined):
            typer.echo(f"{mode}: {report.granularity}s cannot be ranked by {objective}: {ranking.undefined}")
            continue
        verdict = "stable" if ranking.stable else "unstable"
        typer.echo(f"{mode}, most worth protecting first: {unit_list(ranking.units)} ({verdict}: {ranking.reason})")
