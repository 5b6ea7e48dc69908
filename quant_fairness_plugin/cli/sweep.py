"""`quant-fairness sweep`: which layers, or units of layers, matter for which language."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from quant_fairness_plugin.artifacts import SweepReport, Undefined, save, save_run_record, to_json
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.legacy import check_legacy, legacy_sweep
from quant_fairness_plugin.cli.options import COMPUTE, GRID, TEXTS, Access, Json, ModelOption, OutputFile, describe_kept
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.report import write_report
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.sweep_checks import check_execution, check_sets
from quant_fairness_plugin.cli.sweep_options import ExecutionOptions, PlansOptions, SearchOptions
from quant_fairness_plugin.cli.tables import (
    around_table,
    combination_lines,
    necessity_lines,
    show,
    sweep_table,
    synergy_tables,
    unit_list,
)
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.plans.plan_set import check_precisions
from quant_fairness_plugin.preflight import preflight


@options(config=(*GRID, "objective", *TEXTS, *COMPUTE))
def sweep(
    config: FairConfig,
    plans: PlansOptions,
    sets: SearchOptions,
    execution: ExecutionOptions,
    access: Access,
    model: ModelOption = None,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Measure every layer's or unit's part in the damage, language by language, and rank them."""
    if plans.method == "legacy":
        given = {"what to sweep": plans != PlansOptions(method="legacy"), "sets": sets != SearchOptions()}
        check_legacy(config, **given, execution=execution != ExecutionOptions())
        legacy_sweep(access.source(model), config, output=output, as_json=as_json)
        return
    wanted = plans.to_sweep(config, search=sets.to_search(config.objective), top=sets.top)
    check_precisions(wanted.precisions, wanted.modes, config.grid.precision)
    # A plan cannot have both several precisions and a number of layers; a sweep's `top` is about stability alone.
    config = replace(config, precisions=("fp16",), top=sets.top if plans.granularity == "layer" else None)
    source = access.source(model)
    checked = preflight(source, config)
    check_sets(checked.files, config, wanted)
    budget = check_execution(checked.files, config, execution, wanted)

    # Load torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.quantize.workplace import Workplace
    from quant_fairness_plugin.sweep.make_executor import make_executor

    runner = None
    if execution.executor is not None:
        runner = make_executor(execution.executor, workers=execution.workers, spread=":" not in config.device)
    started = time.monotonic()
    with progress(describe_kept(execution.work, "finished trials")) as shown:
        quantizer = FairQuantizer.from_source(
            source, config, checked=checked, progress=shown, place=Workplace(memory_budget=budget)
        )
        report = quantizer.sweep(
            wanted.modes,
            granularity=wanted.granularity,
            precisions=wanted.precisions,
            combine=wanted.combine,
            search=wanted.search,
            max_plans=wanted.max_plans,
            top=wanted.top,
            also=wanted.also,
            bank=execution.bank,
            work=execution.work,
            executor=runner,
        )
    if output is not None:
        _save(report, output, config, seconds=time.monotonic() - started)
    counts = combination_lines(report, config.objective)
    if as_json:
        typer.echo("\n".join(counts), err=True)
        typer.echo(to_json(report), nl=False)
        return
    _show(report, config.objective, counts, bank=execution.bank is not None)


def _save(report: SweepReport, output: Path, config: FairConfig, *, seconds: float) -> None:
    save(report, output)
    write_report(output.with_suffix(".html"), [report], config)
    save_run_record(output, seconds=seconds, device=report.provenance.device, argv=sys.argv)


def _show(report: SweepReport, objective: str, counts: Sequence[str], *, bank: bool) -> None:
    show(sweep_table(report, objective))
    if bank:
        say(f"quantized weights: {report.provenance.arguments['bank']}")
    if report.around:
        show(around_table(report, objective))
    say("\n".join(counts))
    for table in synergy_tables(report, objective):
        show(table)
    _say(report, objective)
    if report.condition:
        say(report.condition)


def _say(report: SweepReport, objective: str) -> None:
    for line in necessity_lines(report, objective):
        say(line)
    for mode in report.modes:
        ranking = report.rankings[f"{mode} {objective}"]
        if isinstance(ranking, Undefined):
            say(f"{mode}: {report.granularity}s cannot be ranked by {objective}: {ranking.undefined}")
            continue
        verdict = "stable" if ranking.stable else "unstable"
        say(f"{mode}, most worth protecting first: {unit_list(ranking.units)} ({verdict}: {ranking.reason})")
