"""`quant-fairness run`: the main job, from a model to a verified checkpoint and a table per language."""

from __future__ import annotations

import typer

from quant_fairness_plugin.artifacts import to_json
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    BackendOption,
    Bits,
    CalibrationOption,
    Clip,
    Format,
    GroupSize,
    Int8Layers,
    Json,
    Languages,
    MaxOverhead,
    ModelOption,
    ObjectiveOption,
    OutputFolder,
    Overwrite,
    Precisions,
    ProtectColumns,
    ProtectLayers,
    ProtectUnits,
    Quantizer,
    Reader,
    Reference,
    Revision,
    Seed,
    Strict,
    Symmetric,
    Texts,
    Top,
    TrustRemoteCode,
    default_output,
    parse_int8_layers,
    parse_integer,
    parse_languages,
    parse_precisions,
    parse_protection,
    parse_reference,
    parse_share,
    parse_units,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.saved_plan import PlanFile, planned
from quant_fairness_plugin.cli.tables import comparison_table, describe_columns, layer_list, show
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.calibration import coverage_lines
from quant_fairness_plugin.recommend import describe_overrides


def run(
    model: ModelOption = None,
    output: OutputFolder = None,
    method: Quantizer = DEFAULTS.method,
    backend: BackendOption = DEFAULTS.backend,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    clip: Clip = DEFAULTS.clip,
    calibration: CalibrationOption = DEFAULTS.calibration,
    plan: PlanFile = None,
    protect_layers: ProtectLayers = "auto",
    precisions: Precisions = "fp16",
    protect_units: ProtectUnits = None,
    int8_layers: Int8Layers = None,
    protect_columns: ProtectColumns = str(DEFAULTS.protect_columns),
    top: Top = None,
    max_overhead: MaxOverhead = DEFAULTS.max_overhead,
    objective: ObjectiveOption = DEFAULTS.objective,
    format_: Format = DEFAULTS.format,
    reader: Reader = DEFAULTS.reader,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    seed: Seed = DEFAULTS.seed,
    strict: Strict = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure, sweep, recommend, quantize, export, verify, and print each language's damage before and after."""
    chosen, options = planned(
        plan,
        {
            "method": method,
            "backend": backend,
            "bits": parse_integer("bits", bits),
            "group_size": parse_integer("group-size", group_size),
            "symmetric": sym,
            "clip": clip,
            "calibration": calibration,
            "protect_layers": parse_protection(protect_layers),
            "precisions": parse_precisions(precisions),
            "protect_units": parse_units(protect_units),
            "int8_layers": parse_int8_layers(int8_layers),
            "protect_columns": parse_share(protect_columns),
            "top": top,
            "max_overhead": max_overhead,
            "objective": objective,
            "format": format_,
            "reader": reader,
            "languages": parse_languages(langs),
            "reference": parse_reference(reference),
            "texts": texts,
            "seed": seed,
            "strict": strict,
        },
    )
    config = make_config(**options)
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    out = output or default_output(source.name)
    preflight(source, config, out=out, overwrite=overwrite)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, progress=shown)
        result = (quantizer if chosen is None else quantizer.following(chosen)).run(out, overwrite=overwrite)
    typer.echo("\n".join(coverage_lines(result.record.calibration)), err=True)
    if as_json:
        typer.echo(to_json(result.record), nl=False)
        return
    kept, others = layer_list(result.plan.protected_layers) or "none", describe_overrides(result.plan)
    singled_out = f"layers {kept} in 16 bit{others and '; '}{others}{describe_columns(result.plan)}"
    title = f"{config.method} {config.grid}, confirm part: without protection, and with {singled_out}"
    show(comparison_table(result.unprotected, result.protected, title=title))
    for reason in (*result.plan.reasons, result.verdict):
        typer.echo(reason)
    typer.echo(f"{out}: {result.record.format}, verified; {result.plan.overhead:.1%} extra bytes for protection")
