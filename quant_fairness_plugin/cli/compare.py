"""`quant-fairness compare`: what the calibration's languages and weights do, without and with protection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from quant_fairness_plugin.artifacts import Bootstrap, write_atomically
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Bits,
    GroupSize,
    Json,
    Languages,
    MaxOverhead,
    ModelOption,
    ProtectLayers,
    Quantizer,
    Reference,
    Revision,
    Seed,
    Symmetric,
    Texts,
    Top,
    TrustRemoteCode,
    parse_calibrations,
    parse_integer,
    parse_languages,
    parse_protection,
    parse_reference,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import layer_list, number, show
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.calibration import coverage_lines

if TYPE_CHECKING:
    from quant_fairness_plugin.analysis.calibration import CalibrationComparison
    from quant_fairness_plugin.analysis.effects import TwoByTwo
    from quant_fairness_plugin.analysis.matrix import CalibrationMatrix

EFFECTS = ("calibration", "calibration_protected", "protection", "protection_calibrated", "both", "interaction")


def compare(
    model: ModelOption = None,
    calibrations: Annotated[
        str, typer.Option(help="Weightings to compare: of english, uniform, proportional, minimax.")
    ] = "english,uniform,minimax",
    matrix: Annotated[bool, typer.Option("--matrix", help="Also calibrate on each language alone.")] = False,
    method: Quantizer = DEFAULTS.method,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    protect_layers: ProtectLayers = "auto",
    top: Top = None,
    max_overhead: MaxOverhead = DEFAULTS.max_overhead,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    seed: Seed = DEFAULTS.seed,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the comparison as JSON.")] = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Quantize in memory by several calibrations, without and with protection, and print what each choice brings."""
    weightings = parse_calibrations(calibrations)
    config = make_config(
        method=method,
        bits=parse_integer("bits", bits),
        group_size=parse_integer("group-size", group_size),
        symmetric=sym,
        protect_layers=parse_protection(protect_layers),
        top=top,
        max_overhead=max_overhead,
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
        seed=seed,
    )
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    preflight(source, config)

    from quant_fairness_plugin.analysis.calibration import Calibrations, compare_calibrations, to_json
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    wanted = Calibrations(weightings=weightings, tokens_per_language=config.tokens_per_language, matrix=matrix)
    wanted.check(config.method)
    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, progress=shown)
        result = compare_calibrations(
            quantizer.loaded,
            quantizer.texts,
            quantizer.recommend(),
            wanted,
            method=config.method,
            bootstrap=Bootstrap(None, config.draws, seed),
            progress=shown,
        )
    document = to_json(result)
    if output is not None:
        write_atomically(output, document.encode())
    for outcome in result.outcomes:
        typer.echo("\n".join(coverage_lines(outcome.summary)), err=True)
    if as_json:
        typer.echo(document, nl=False)
        return
    _show(result)


def _show(result: CalibrationComparison) -> None:
    kept = layer_list(result.plan.protected_layers) or "none"
    show(_outcomes(result, title=f"{result.method} {result.plan.grid}: KL bits per byte, confirm part"))
    for table in result.tables:
        show(_effects(table, title=f"{table.first} → {table.other} × protection of {kept}: KL lowered, bits per byte"))
        typer.echo(table.verdict)
    if result.matrix is not None:
        show(_matrix(result.matrix))
        typer.echo(result.matrix.verdict)


def _outcomes(result: CalibrationComparison, *, title: str) -> Table:
    heads = [f"{o.calibration}, {'plan' if o.protected else 'none'}" for o in result.outcomes]
    table = Table("language", *heads, "status", title=title)
    for rows in zip(*(outcome.languages for outcome in result.outcomes), strict=True):
        table.add_row(rows[0].language, *(number(row.kl_bits_per_byte, 4) for row in rows), rows[0].status)
    table.add_section()
    table.add_row("worst KL", *(number(outcome.worst_kl, 4) for outcome in result.outcomes), "supported only")
    table.add_row("mean KL", *(number(outcome.mean_kl, 4) for outcome in result.outcomes), "supported only")
    return table


def _effects(two_by_two: TwoByTwo, *, title: str) -> Table:
    table = Table("language", *(name.replace("_", ", ") for name in EFFECTS), "relative interaction", title=title)
    for row in two_by_two.effects:
        table.add_row(
            row.subject, *(number(getattr(row, name), 4) for name in EFFECTS), number(row.relative_interaction, 3)
        )
    return table


def _matrix(matrix: CalibrationMatrix) -> Table:
    known = [row.language for row in matrix.rows[0].languages if row.status == "supported"]
    table = Table("calibrated on", *known, "worst", title="KL bits per byte: calibration by row, evaluation by column")
    for row in matrix.rows:
        cells = {damage.language: f"{damage.kl_bits_per_byte.estimate:.4f}" for damage in row.languages}
        table.add_row(row.calibration, *(cells[name] for name in known), number(row.worst_kl, 4))
    return table
