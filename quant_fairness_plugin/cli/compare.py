"""`quant-fairness compare`: two checkpoints, or what the calibration's languages and weights do to one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from quant_fairness_plugin.artifacts import Bootstrap, Weighting, write_atomically
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.options import (
    COMPUTE,
    GRID,
    TEXTS,
    Access,
    Json,
    ModelOption,
    OutputFile,
    parse_calibrations,
)
from quant_fairness_plugin.cli.original import base_model
from quant_fairness_plugin.cli.pair import check_pair, compare_pair
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import layer_list, number, show
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.calibration import coverage_lines

if TYPE_CHECKING:
    from quant_fairness_plugin.analysis.calibration import CalibrationComparison
    from quant_fairness_plugin.analysis.effects import TwoByTwo
    from quant_fairness_plugin.analysis.matrix import CalibrationMatrix

CALIBRATIONS: tuple[Weighting, ...] = ("english", "uniform", "minimax")
EFFECTS = ("calibration", "calibration_protected", "protection", "protection_calibrated", "both", "interaction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, and when that fails."""

    margin: Annotated[
        float | None,
        Option("Of A and B: exit with status 6 unless B loses at most this beyond A, KL in bits per byte.", "Output"),
    ] = None
    calibrations: Annotated[
        tuple[Weighting, ...],
        Option(
            "Weightings of languages to compare: some of english, uniform, proportional, minimax.",
            "Texts",
            parse=parse_calibrations,
            metavar="LIST",
            names=get_args(Weighting),
        ),
    ] = CALIBRATIONS
    matrix: Annotated[bool, Option("Also calibrate on each language alone.", "Texts")] = False


@options(config=("method", *GRID, "protect_layers", "top", "max_overhead", *TEXTS, *COMPUTE))
def compare(
    config: FairConfig,
    access: Access,
    how: Comparison,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[A B]", help="Two checkpoints of one model: folders of any tool, or .gguf files."),
    ] = None,
    model: ModelOption = None,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Compare checkpoint B with A, each against the 16-bit model, language by language, sentences paired.

    Without checkpoints: quantize in memory by several calibrations, without and with protection, and print what each
    one brings.
    """
    if checkpoints:
        check_pair(config, checkpoints, how.margin, calibrations=how.calibrations != CALIBRATIONS, matrix=how.matrix)
        source = access.source(model or base_model(checkpoints[0]))
        compare_pair(source, config, checkpoints, how.margin, output=output, as_json=as_json)
        return
    if how.margin is not None:
        raise ConfigError(f"--margin {how.margin:g} is for two checkpoints; name them: compare A B --model ORIGINAL")
    result = _compare_calibrations(access.source(model), config, how)

    from quant_fairness_plugin.analysis.calibration import to_json

    document = to_json(result)
    if output is not None:
        write_atomically(output, document.encode())
    for outcome in result.outcomes:
        typer.echo("\n".join(coverage_lines(outcome.summary)), err=True)
    if as_json:
        typer.echo(document, nl=False)
        return
    _show(result)


def _compare_calibrations(source: ModelSource, config: FairConfig, how: Comparison) -> CalibrationComparison:
    checked = preflight(source, config)

    # Loads torch.
    from quant_fairness_plugin.analysis.calibration import Calibrations, compare_calibrations
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    wanted = Calibrations(
        weightings=how.calibrations, tokens_per_language=config.tokens_per_language, matrix=how.matrix
    )
    wanted.check(config.method)
    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, checked=checked, progress=shown)
        return compare_calibrations(
            quantizer.loaded,
            quantizer.texts,
            quantizer.recommend(),
            wanted,
            method=config.method,
            bootstrap=Bootstrap(None, config.draws, config.seed),
            progress=shown,
        )


def _show(result: CalibrationComparison) -> None:
    layers = layer_list(result.plan.protected_layers) or "none"
    sentences = result.condition or "confirm part"
    show(_outcomes(result, title=f"{result.method} {result.plan.grid}: KL bits per byte, {sentences}"))
    for table in result.tables:
        show(
            _effects(table, title=f"{table.first} → {table.other} × protection of {layers}: KL lowered, bits per byte")
        )
        say(table.verdict)
    if result.matrix is not None:
        show(_matrix(result.matrix))
        say(result.matrix.verdict)


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
