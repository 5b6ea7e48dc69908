"""`quant-fairness sweep`: which layers matter for which language."""

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
    GroupSize,
    Json,
    Languages,
    Mode,
    ModelOption,
    ObjectiveOption,
    Reference,
    Revision,
    Seed,
    Symmetric,
    Texts,
    TrustRemoteCode,
    parse_integer,
    parse_languages,
    parse_modes,
    parse_reference,
    require_model,
)
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.tables import layer_list, show, sweep_table
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.preflight import ModelSource, preflight


def sweep(
    model: ModelOption = None,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    mode: Mode = "protect-one",
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    objective: ObjectiveOption = DEFAULTS.objective,
    top: Annotated[int, typer.Option(help="How many layers the stability figures are about.")] = 3,
    seed: Seed = DEFAULTS.seed,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also save the report as JSON.")] = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Measure every layer's part in the damage, language by language, and rank the layers."""
    config = make_config(
        bits=parse_integer("bits", bits),
        group_size=parse_integer("group-size", group_size),
        symmetric=sym,
        objective=objective,
        top=top,
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
        seed=seed,
    )
    modes = parse_modes(mode)
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    preflight(source, config)

    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    started = time.monotonic()
    with progress() as shown:
        report = FairQuantizer.from_source(source, config, progress=shown).sweep(modes)
    if output is not None:
        save(report, output)
        save_run_record(output, seconds=time.monotonic() - started, device="cpu", argv=sys.argv)
    if as_json:
        typer.echo(to_json(report), nl=False)
        return
    show(sweep_table(report, config.objective))
    for first in modes:
        ranking = report.rankings[f"{first} {config.objective}"]
        if isinstance(ranking, Undefined):
            typer.echo(f"{first}: layers cannot be ranked by {config.objective}: {ranking.undefined}")
            continue
        verdict = "stable" if ranking.stable else "unstable"
        typer.echo(f"{first}, most worth protecting first: {layer_list(ranking.layers)} ({verdict}: {ranking.reason})")
