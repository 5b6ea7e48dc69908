"""`quant-fairness generate DIR --prompt "…"`: the continuation on stdout as it comes, its speed on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from quant_fairness_plugin.cli.options import Json


def generate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, as it is: no chat template.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 100,
    kernel: Annotated[
        str, typer.Option(help="auto, triton (NVIDIA GPU), cpu, or reference (exact, float32).")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt greedily with an exported checkpoint; on a CPU in bfloat16, with reference in float32."""
    from quant_fairness_plugin.serve.generate import generate_text, load_tokenizer
    from quant_fairness_plugin.serve.kernels import choose_kernel
    from quant_fairness_plugin.serve.load import load_quantized

    name = choose_kernel(kernel).kernel
    model = load_quantized(folder, kernel=name)
    write = None if as_json else _write
    done = generate_text(model, load_tokenizer(folder), prompt, max_new_tokens=max_new_tokens, write=write)
    where = f"{str(model.dtype).removeprefix('torch.')} on {model.device}"
    rate = done.tokens_per_second
    if as_json:
        numbers = {"prompt_tokens": done.prompt_tokens, "new_tokens": done.new_tokens}
        seconds = {"prefill_seconds": done.prefill_seconds, "decode_seconds": done.decode_seconds}
        typer.echo(
            json.dumps(
                {"text": done.text, "kernel": name, "where": where, **numbers, **seconds, "tokens_per_second": rate},
                indent=1,
                ensure_ascii=False,
            )
        )
        return
    typer.echo()
    shown = "one token only" if rate is None else f"{rate:.1f} tokens per second after the first"
    typer.echo(f"{done.new_tokens} tokens, {shown}, prompt {done.prefill_seconds:.2f} s; {name}, {where}", err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
