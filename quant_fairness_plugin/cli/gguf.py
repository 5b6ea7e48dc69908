"""`quant-fairness gguf DIR --like FILE`: a checkpoint as one file for llama.cpp."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from quant_fairness_plugin.cli.options import Json, Overwrite
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.config.parsers import choice
from quant_fairness_plugin.model.gguf import Embedding
from quant_fairness_plugin.model.sizes import shown

if TYPE_CHECKING:
    from quant_fairness_plugin.export.gguf import GgufReport


def gguf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, ours or another tool's.")],
    like: Annotated[
        Path,
        typer.Option(
            "--like",
            metavar="FILE.gguf",
            help="A GGUF file of the 16-bit model, of any type: metadata and tokenizer come from it.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.gguf", help="File to write. Default: DIR.gguf.")
    ] = None,
    embedding: Annotated[
        str,
        typer.Option(
            "--embedding",
            metavar="q8_0|16bit",
            help="What the embedding and the head are stored as.",
            parser=choice("--embedding", get_args(Embedding)),
        ),
    ] = "q8_0",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a GGUF file for llama.cpp: the same integers, the embedding in 8 bits."""
    from quant_fairness_plugin.export.gguf import write_gguf

    out = output or folder.with_name(f"{folder.resolve().name}.gguf")
    report = write_gguf(folder, like, out, embedding=cast(Embedding, embedding), overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=1, ensure_ascii=False))
    else:
        say(describe_gguf(report))


def describe_gguf(report: GgufReport, *, measured: bool = False) -> str:
    """Write what a file holds, how it was checked, and what was not run.

    Args:
        report: of the file.
        measured: what its weights lose stands above.
    """
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(report.types.items()))
    equal = "to the last bit" if report.exact else "but for scales below 2^-17, which float16 rounds"
    lines = [
        f"{report.path}: {shown(report.bytes_)}; {types}",
        f"Read again by {report.checked_with} in float32: {report.packed} quantized modules equal to the checkpoint's "
        f"{equal}",
    ]
    if report.embedding_error is not None:
        lines.append(f"Embedding and head in 8 bits: changed by {100 * report.embedding_error:.2g} % of their size")
    lines.append("llama.cpp was not run. It also rounds the inputs of its products to 8 bits")
    if not measured:
        lines[-1] += f"; quant-fairness measure {report.path} says what the weights alone lose"
    return "\n".join(lines)
