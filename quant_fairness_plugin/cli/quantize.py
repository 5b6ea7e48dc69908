"""`quant-fairness quantize`: one checkpoint, protected as asked."""

from __future__ import annotations

from pathlib import Path

import typer

from quant_fairness_plugin.artifacts import ExportRecord, ProtectionPlan, to_json
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
    ModelArgument,
    OutputFolder,
    Overwrite,
    Precisions,
    ProtectBiases,
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
    TrustRemoteCode,
    check_protect_biases,
    default_output,
    parse_int8_layers,
    parse_integer,
    parse_languages,
    parse_precisions,
    parse_protection,
    parse_reference,
    parse_share,
    parse_units,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.saved_plan import PlanFile, planned
from quant_fairness_plugin.cli.tables import damage_table, describe_columns, layer_list, show
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.calibration import coverage_lines
from quant_fairness_plugin.recommend import describe_overrides


def quantize(
    model: ModelArgument,
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
    protect_biases: ProtectBiases = True,
    max_overhead: MaxOverhead = DEFAULTS.max_overhead,
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
    """Quantize MODEL, keep the protected layers in 16 bit, verify what was written and measure it."""
    check_protect_biases(protect_biases)
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
            "max_overhead": max_overhead,
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
    source = ModelSource(model, revision, trust_remote_code, allow_pickle)
    out = output or default_output(model)
    record = write_checkpoint(source, config, out, plan=chosen, overwrite=overwrite)
    report_checkpoint(record, out, as_json=as_json)


def write_checkpoint(
    source: ModelSource, config: FairConfig, out: Path, *, plan: ProtectionPlan | None = None, overwrite: bool
) -> ExportRecord:
    """Check what can be checked without torch, then quantize, export, verify and measure."""
    preflight(source, config, out=out, overwrite=overwrite)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        quantizer = FairQuantizer.from_source(source, config, progress=shown)
        return (quantizer if plan is None else quantizer.following(plan)).save_pretrained(out, overwrite=overwrite)


def report_checkpoint(record: ExportRecord, out: Path, *, as_json: bool) -> None:
    """Print what was written: the record as JSON, or the table and a line; what it was calibrated on, on stderr."""
    typer.echo("\n".join(coverage_lines(record.calibration)), err=True)
    if as_json:
        typer.echo(to_json(record), nl=False)
        return
    if record.measurement is not None:
        show(damage_table(record.measurement, title=f"{out}: damage against the 16-bit model, confirm part"))
    kept = layer_list(record.plan.protected_layers) or "none"
    others = describe_overrides(record.plan)
    singled_out = f"protected layers {kept}{others and '; '}{others}{describe_columns(record.plan)}"
    typer.echo(f"{out}: {record.method} {record.plan.grid}, {record.format}, {singled_out}, verified")
