"""`quant-fairness run`: the main job, from a model to a verified checkpoint and a table per language."""

from __future__ import annotations

import typer

from quant_fairness_plugin.artifacts import to_json
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Bits,
    Format,
    GroupSize,
    Json,
    Languages,
    MaxOverhead,
    ModelOption,
    ObjectiveOption,
    OutputFolder,
    Overwrite,
    ProtectLayers,
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
    parse_integer,
    parse_languages,
    parse_protection,
    parse_reference,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import comparison_table, layer_list, show
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.preflight import ModelSource, preflight


def run(
    model: ModelOption = None,
    output: OutputFolder = None,
    method: Quantizer = DEFAULTS.method,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    protect_layers: ProtectLayers = "auto",
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
    config = make_config(
        method=method,
        bits=parse_integer("bits", bits),
        group_size=parse_integer("group-size", group_size),
        symmetric=sym,
        protect_layers=parse_protection(protect_layers),
        top=top,
        max_overhead=max_overhead,
        objective=objective,
        format=format_,
        reader=reader,
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
        seed=seed,
        strict=strict,
    )
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    out = output or default_output(source.name)
    preflight(source, config, out=out, overwrite=overwrite)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as shown:
        result = FairQuantizer.from_source(source, config, progress=shown).run(out, overwrite=overwrite)
    if as_json:
        typer.echo(to_json(result.record), nl=False)
        return
    kept = layer_list(result.plan.protected_layers) or "none"
    title = f"{config.method} {config.grid}, confirm part: without protection, and with layers {kept} in 16 bit"
    show(comparison_table(result.unprotected, result.protected, title=title))
    for reason in (*result.plan.reasons, result.verdict):
        typer.echo(reason)
    typer.echo(f"{out}: {result.record.format}, verified; {result.plan.overhead:.1%} extra bytes for protection")
