"""Output and more: what is written, what fails, where it is computed, and what draws depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from quant_fairness_plugin.artifacts import CheckpointFormat, Reader
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.model.devices import Dtype
from quant_fairness_plugin.model.gguf import Embedding


@dataclass(frozen=True, kw_only=True)
class OutputFields:
    """The fields of `FairConfig` that say what is written, and how it is computed."""

    format: Annotated[CheckpointFormat, Option("Checkpoint format:", "Output")] = "compressed-tensors"
    reader: Annotated[Reader, Option("Reader that must be able to load the checkpoint:", "Output")] = "transformers"
    like: Annotated[
        str | None,
        Option(
            "With --format gguf: a GGUF file of the 16-bit model, of any type, whose metadata and tokenizer the output "
            "gets. Default: MODEL, where it is one.",
            "Output",
            metavar="FILE.gguf",
        ),
    ] = None
    embedding: Annotated[
        Embedding, Option("With --format gguf: what the embedding and the head are stored as:", "Output")
    ] = "q8_0"
    gate: Annotated[
        str | None,
        Option(
            "Exit with status 6 unless the KL stays below a bound in every language, such as worst=0.05, or mean=0.05.",
            "Output",
            metavar="NAME=BOUND",
        ),
    ] = None
    protect_biases: Annotated[
        bool,
        Option(
            "Biases stay in 16 bit: always the case, so this changes nothing.",
            "More",
            flag="--protect-biases/--no-protect-biases",
        ),
    ] = True
    protect_final_ln: Annotated[
        bool,
        Option(
            "The final norm stays in 16 bit: always the case, so this changes nothing.",
            "More",
            flag="--protect-final-ln/--no-protect-final-ln",
        ),
    ] = True
    device: Annotated[
        str,
        Option(
            "Where to compute: cpu, cuda, cuda:1, mps, xpu, or auto: the first accelerator that is there, else cpu.",
            "More",
            metavar="NAME",
            names=("auto", "cpu", "cuda", "mps", "xpu"),
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype,
        Option(
            "What to compute in; auto is bfloat16 for weights stored in it, on an accelerator and where this CPU "
            "multiplies faster in it, else float32:",
            "More",
        ),
    ] = "auto"
    prompts: Annotated[
        str,
        Option(
            "What the checkpoint is asked in every language, beside the 16-bit model: 'bundled', a file such as "
            "--texts takes, or 'none'.",
            "Texts",
            metavar="SOURCE",
            names=("bundled", "none"),
        ),
    ] = "bundled"
    draws: Annotated[int, Option("Bootstrap resamples behind every interval.", "More")] = 2000
    seed: Annotated[int, Option("Seed of every random draw.", "More")] = 0
    strict: Annotated[
        bool,
        Option(
            "An unstable ranking or a failed gate is an error (exit status 6), and so are a --group-size that does not "
            "fit every unit (2) and a module that cannot be quantized (3), not a warning.",
            "More",
            flag="--strict/--no-strict",
        ),
    ] = False
