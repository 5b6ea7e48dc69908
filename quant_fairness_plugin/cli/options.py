"""Arguments that several commands share, and the pure functions that parse them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from quant_fairness_plugin.artifacts import Granularity, Part, Precision, SearchMethod, Weighting
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.measure.objectives import OBJECTIVES, one_of
from quant_fairness_plugin.plans.search import Search
from quant_fairness_plugin.quantize.grid_rules import check_bits, check_group_size

DEFAULTS = FairConfig()

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="demo, demo-gpt2, a Hub id, a folder, or a .safetensors file.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="demo, demo-gpt2, a Hub id, a folder, or a .safetensors file.")
]
Languages = Annotated[
    str | None, typer.Option("--langs", help="Languages to measure, such as en,he,ar,zh. Default: all of the text set.")
]
Reference = Annotated[
    str, typer.Option(help="Language that excess and disparity are measured against, or 'none'.", show_default=True)
]
Texts = Annotated[str, typer.Option(help="'bundled', a JSON, JSONL or TSV file, a folder, or datasets:NAME.")]
Bits = Annotated[str, typer.Option(metavar="INTEGER", help="Bits of a quantized weight.")]
GroupSize = Annotated[str, typer.Option(metavar="32|64|128|-1", help="Input channels per scale; -1 = all of a row.")]
Symmetric = Annotated[
    bool | None,
    typer.Option("--sym/--asym", help="Symmetric grid, or one with zero points. Default: --asym for awq, else --sym."),
]
Clip = Annotated[
    str,
    typer.Option(
        help="Range of a scale: absmax, mse, gaussian, laplace, student-t, empirical, or minimax (languages)."
    ),
]
Mode = Annotated[str, typer.Option(help="protect-one, quantize-one, or both.")]
GranularityOption = Annotated[
    str, typer.Option("--granularity", help="Single out each 'layer', or each fusion 'unit' of a layer (3.down).")
]
Combine = Annotated[
    str, typer.Option(metavar="1|2|3", help="Single out one at a time, all pairs besides, or all triples too.")
]
Precisions = Annotated[
    str, typer.Option("--precisions", help="What a layer may get instead of --bits: fp16, or fp16,int8 for both.")
]
SearchOption = Annotated[
    str | None,
    typer.Option(
        "--search", help="Look for a set to protect by evaluating sets: greedy, backward (from all), or beam."
    ),
]
SetSize = Annotated[int, typer.Option("--size", help="Layers or units in the set of --search.")]
BeamWidth = Annotated[int, typer.Option("--width", help="Sets that --search beam keeps.")]
MaxPlans = Annotated[int, typer.Option(min=1, help="Most pairs, and most triples; else those of the leading units.")]
Also = Annotated[
    str | None,
    typer.Option(
        "--also",
        help="Simulation only, no checkpoint stores these quantized: further plans that quantize embeddings, "
        "positions, biases, norms, final_norm or head (a list with commas), alone or with all else.",
    ),
]
BankOption = Annotated[
    Path | None,
    typer.Option(
        "--bank",
        metavar="DIR",
        help="Take the quantized weights from this checkpoint of the model (GPTQ, AWQ or compressed-tensors), instead "
        "of rounding to nearest.",
    ),
]
Work = Annotated[
    Path | None, typer.Option("--work", help="Keep finished trials in this folder: an interrupted sweep goes on there.")
]
ExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--executor",
        help="local, processes or ray: trials of one thread each, the same bits everywhere. Default: all threads here.",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="Read the model layer by layer, with at most this beside Python's own 0.4 GB: 1.5GB or 800MiB.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes of --executor. Default: as many as fit.")]
ObjectiveOption = Annotated[str, typer.Option("--objective", help=f"{one_of(OBJECTIVES)}.")]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model's folder brings.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights, which can run code, if no others.")
]
Revision = Annotated[str | None, typer.Option(help="Revision (commit hash) of a Hub model.")]
Quantizer = Annotated[str, typer.Option("--method", help="gptq, or rtn (round to nearest, no calibration).")]
BackendOption = Annotated[
    str, typer.Option("--backend", help="Who quantizes: native, gptqmodel, llmcompressor, or another installed one.")
]
CalibrationOption = Annotated[
    str, typer.Option("--calibration", help="How much each language counts: uniform, proportional, english or minimax.")
]
Top = Annotated[int | None, typer.Option(help="Protect exactly this many layers, instead of the budget's choice.")]
OutputFolder = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write. Default: NAME-int4-fair.")]
MaxOverhead = Annotated[float, typer.Option(help="Budget of 'auto': extra bytes over the all-INT4 checkpoint.")]
Format = Annotated[str, typer.Option("--format", help="Checkpoint format: compressed-tensors, gptq, awq or fp16-twin.")]
Reader = Annotated[str, typer.Option(help="Reader that must load it: transformers, vllm or gptqmodel.")]
Dtype = Annotated[
    str, typer.Option(help="What the sweep computes in: float32, or bfloat16, faster where the processor has it.")
]
ProtectLayers = Annotated[
    str, typer.Option(help="'auto' (sweep and choose), 'none', or layer indices from 0, such as 0,9,11.")
]
ProtectUnits = Annotated[
    str | None, typer.Option(help="Fusion groups that keep 16 bit besides, as LAYER.UNIT: 3.down,5.qkv.")
]
Int8Layers = Annotated[str | None, typer.Option(help="Layers that get 8 bits instead of --bits, such as 3,5.")]
ProtectColumns = Annotated[
    str,
    typer.Option(
        metavar="SHARE",
        help="Input channels of each quantized module in 16 bit, such as 1%; only our loader reads them.",
    ),
]
ProtectBiases = Annotated[
    bool, typer.Option("--protect-biases/--no-protect-biases", help="Biases are always 16 bit; recorded.")
]
Strict = Annotated[bool, typer.Option("--strict", help="An unstable ranking or failed gate exits 6.")]


def parse_languages(text: str | None) -> tuple[str, ...] | None:
    """`"en, he"` → `("en", "he")`; None stays None. Names are checked later, against the text set.

    Raises:
        ConfigError: an empty list or an empty name in it.
    """
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(
            f"--langs {text!r} holds an empty name; write languages with commas between, such as en,he,ar"
        )
    return names


def parse_reference(text: str) -> str | None:
    """`"none"` → None, everything else as it is."""
    return None if text.strip().lower() == "none" else text.strip()


def parse_protection(text: str) -> Literal["auto", "none"] | tuple[int, ...]:
    """`"auto"`, `"none"`, or a layer list such as `"0,9,11"`, whose range is checked once the model is known.

    Raises:
        InvalidLayerError: an empty list, a word, or a number that is no layer index.
    """
    word = text.strip().lower()
    if word == "auto":
        return "auto"
    if word == "none":
        return "none"
    try:
        return tuple(int(item) for item in word.split(","))
    except ValueError as err:
        raise InvalidLayerError(
            f"--protect-layers {text!r} is not a list of layer indices; use 'auto', 'none', or indices such as 0,9,11"
        ) from err


def parse_units(text: str | None) -> tuple[str, ...]:
    """`"3.down, 5.qkv"` → `("3.down", "5.qkv")`; None → none. Checked later, against each other and the model."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def parse_int8_layers(text: str | None) -> tuple[int, ...]:
    """`"3,5"` → `(3, 5)`; None → none. The range is checked once the model is known.

    Raises:
        InvalidLayerError: an empty list, a word, or a number that is no layer index.
    """
    try:
        return () if text is None else tuple(int(item) for item in text.split(","))
    except ValueError as err:
        raise InvalidLayerError(
            f"--int8-layers {text!r} is not a list of layer indices; use indices such as 3,5"
        ) from err


def parse_share(text: str) -> float:
    """`"1%"` or `"0.01"` → 0.01. The range is checked later.

    Raises:
        ConfigError: no number.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError as err:
        raise ConfigError(f"--protect-columns {text!r} is no share; use a percentage such as 1%, or 0.01") from err
    return value / 100 if text.strip().endswith("%") else value


def parse_integer(name: str, text: str) -> int:
    """An option whose value must be an integer, so that 3.5 gets our message and not a parser's.

    Raises:
        ConfigError: anything but an integer; for `bits` and `group-size` also one that no grid has.
    """
    try:
        value: Any = int(text)
    except ValueError:
        value = text
    if name == "bits":
        check_bits(value)
    elif name == "group-size":
        check_group_size(value)
    return int(value)


def check_protect_biases(protect_biases: bool) -> None:
    """Refuse `--no-protect-biases`: no checkpoint format has quantized biases.

    Raises:
        ConfigError: biases should be quantized.
    """
    if not protect_biases:
        raise ConfigError(
            "--no-protect-biases cannot be had: every checkpoint format keeps biases in 16 bit; leave the option out"
        )


def default_output(model: str) -> Path:
    """`<name>-int4-fair` in the current folder, for a model name, Hub id, folder or file."""
    path = Path(model)
    name = path.resolve().parent.name if path.suffix == ".safetensors" else path.name or path.resolve().name
    return Path(f"{name}-int4-fair")


def parse_calibrations(text: str) -> tuple[Weighting, ...]:
    """`"english, minimax"` → `("english", "minimax")`.

    Raises:
        ConfigError: an empty list, a name twice, or a word that is no way to weight languages.
    """
    names = tuple(name.strip().lower() for name in text.split(","))
    known = get_args(Weighting)
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise ConfigError(
            f"--calibrations {text!r}: name each one once, of {', '.join(known)}; write them with commas between, "
            "such as english,uniform"
        )
    return cast(tuple[Weighting, ...], names)


def parse_modes(text: str) -> tuple[Literal["protect-one", "quantize-one"], ...]:
    """`both` → both sweep modes.

    Raises:
        ConfigError: another word than `protect-one`, `quantize-one`, `both`.
    """
    match text:
        case "protect-one":
            return ("protect-one",)
        case "quantize-one":
            return ("quantize-one",)
        case "both":
            return ("protect-one", "quantize-one")
    raise ConfigError(f"--mode {text!r} is unknown; use protect-one, quantize-one or both")


def parse_granularity(text: str) -> Granularity:
    """What a sweep singles out.

    Raises:
        ConfigError: another word than `layer` or `unit`.
    """
    for known in get_args(Granularity):
        if text == known:
            return cast(Granularity, known)
    raise ConfigError(f"--granularity {text!r} is unknown; use {' or '.join(get_args(Granularity))}")


def parse_dtype(text: str) -> Literal["float32", "bfloat16"]:
    """What to compute in.

    Raises:
        ConfigError: neither of the two.
    """
    match text:
        case "float32" | "bfloat16":
            return text
    raise ConfigError(f"--dtype {text!r} is not swept in; use float32, or bfloat16")


def parse_combine(text: str) -> int:
    """How many units a plan singles out at most.

    Raises:
        ConfigError: anything but 1, 2 or 3.
    """
    if text not in ("1", "2", "3"):
        raise ConfigError(f"--combine {text!r} is not allowed; use 1 (single), 2 (and pairs) or 3 (and triples)")
    return int(text)


def parse_precisions(text: str) -> tuple[Precision, ...]:
    """`"fp16, int8"` → `("fp16", "int8")`. What fits together is checked later.

    Raises:
        ConfigError: a word that is no precision.
    """
    names, known = tuple(name.strip().lower() for name in text.split(",")), get_args(Precision)
    if not set(names) <= set(known):
        raise ConfigError(f"--precisions {text!r}: write some of {', '.join(known)} with commas between")
    return cast(tuple[Precision, ...], names)


def parse_search(method: str | None, *, size: int, width: int, objective: str) -> Search | None:
    """How to look for sets; None where nothing is to be looked for.

    Raises:
        ConfigError: no such method, an objective that sets are not compared by, or a size or width that is none.
    """
    if method is None:
        return None
    return Search(method=cast(SearchMethod, method), size=size, width=width, objective=objective)


def parse_weights(text: str | None) -> dict[str, float] | None:
    """`"en=1, fi=2"` → `{"en": 1.0, "fi": 2.0}`; None stays None. Languages are checked later, against the report.

    Raises:
        ConfigError: not LANGUAGE=NUMBER with commas between, or a language twice.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        try:
            number = float(value)
        except ValueError as err:
            raise ConfigError(
                f"--weights {text!r}: write LANGUAGE=NUMBER with commas between, such as en=1,fi=2"
            ) from err
        if not name or name in found:
            raise ConfigError(f"--weights {text!r}: name each language once, such as en=1,fi=2")
        found[name] = number
    return found


def parse_also(text: str | None) -> tuple[str, ...]:
    """`"embeddings, biases"` → `("embeddings", "biases")`; None → none. Checked later, against the model."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def parse_executor(text: str | None) -> Literal["local", "processes", "ray"] | None:
    """Where trials run; None stays None.

    Raises:
        ConfigError: another word than `local`, `processes`, `ray`.
    """
    match text:
        case None | "local" | "processes" | "ray":
            return text
    raise ConfigError(f"--executor {text!r} is unknown; use local, processes or ray")


def parse_part(text: str) -> Part:
    """A part of the text set.

    Raises:
        ConfigError: another word than `calibrate`, `search`, `confirm`, `all`.
    """
    for part in get_args(Part):
        if text == part:
            return cast(Part, part)
    raise ConfigError(f"--part {text!r} is unknown; use {', '.join(get_args(Part))}")


def require_model(model: str | None) -> str:
    """The model's name, which these commands cannot do without.

    Raises:
        ConfigError: no model was given.
    """
    if not model:
        raise ConfigError("no model given; name one with --model, for example --model demo (bundled)")
    return model
