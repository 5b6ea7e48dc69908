"""`gptq-quantize MODEL --bits 4 --protect-layers 0,9,11 --protect-biases`: the seeds' command."""

from __future__ import annotations

import sys

import typer

from quant_fairness_plugin.cli.main import run_guarded
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Bits,
    Format,
    GroupSize,
    Json,
    Languages,
    MaxOverhead,
    ModelArgument,
    OutputFolder,
    Overwrite,
    ProtectBiases,
    ProtectLayers,
    Reader,
    Reference,
    Revision,
    Seed,
    Strict,
    Symmetric,
    Texts,
    TrustRemoteCode,
)
from quant_fairness_plugin.cli.quantize import quantize

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def gptq_quantize(
    model: ModelArgument,
    output: OutputFolder = None,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    protect_layers: ProtectLayers = "none",
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
    """Quantize MODEL with GPTQ, keep the given layers in 16 bit, verify what was written and measure it."""
    quantize(
        model,
        output=output,
        method="gptq",
        bits=bits,
        group_size=group_size,
        sym=sym,
        protect_layers=protect_layers,
        protect_biases=protect_biases,
        max_overhead=max_overhead,
        format_=format_,
        reader=reader,
        langs=langs,
        reference=reference,
        texts=texts,
        seed=seed,
        strict=strict,
        overwrite=overwrite,
        as_json=as_json,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def main() -> None:
    """Entry point of `gptq-quantize`."""
    sys.exit(run_guarded(typer.main.get_command(app), sys.argv[1:], "gptq-quantize"))
