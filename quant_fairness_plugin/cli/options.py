"""Options that several commands share: records of declared fields, plain parameters, and the parsers of their text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from quant_fairness_plugin.artifacts import Weighting, check_file_place
from quant_fairness_plugin.cli.stopping import NOTHING_LEFT
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_names
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.hub import go_offline
from quant_fairness_plugin.model.sizes import parse_size
from quant_fairness_plugin.preflight import ModelSource

TEXTS = ("languages", "reference", "texts", "start", "seed")
"""Fields of `FairConfig` that every command with a model takes."""
COMPUTE = ("device", "dtype")
"""Fields of `FairConfig` that every command takes that computes with a model."""
INTEGERS = ("bits", "group_size", "symmetric")
"""Fields of `FairConfig` that say which integers there are."""
GRID = ("scheme", *INTEGERS)
"""Fields of `FairConfig` that say what weights become."""

_MODEL = "demo, demo-gpt2, a Hub id, a folder, or a .safetensors or .gguf file."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=_MODEL,
        rich_help_panel="Model",
        autocompletion=lambda: ["demo", "demo-gpt2"],
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Folder to write. Default: NAME-int4-fair.", rich_help_panel="Output"
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel="Output")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel="Output")
]


def writable(path: Path | None) -> Path | None:
    """Return the name of a file to write, checked before the work whose result it is to hold.

    Raises:
        ConfigError, ResourceError: no file can be there.
    """
    if path is not None:
        check_file_place(path)
    return path


OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Also save the result as JSON.", rich_help_panel="Output",
        callback=writable,
    ),
]  # fmt: skip


MemoryBudget = Annotated[
    str | None,
    Option(
        "Read the model layer by layer, with at most this beside Python's own 0.4 GB: 1.5GB or 800MiB.",
        "More",
        metavar="SIZE",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a run keeps what it has done, and how much memory it takes. Nothing of it changes a figure."""

    work: Annotated[
        Path | None,
        Option(
            "Keep finished layers and the 16-bit model's states in this folder: a run that was ended goes on there.",
            "More",
            metavar="DIR",
        ),
    ] = None
    memory_budget: MemoryBudget = None

    @property
    def bytes_(self) -> int | None:
        """The memory budget in bytes; None where none was given.

        Raises:
            ConfigError: not a size.
        """
        return None if self.memory_budget is None else parse_size(self.memory_budget)

    @property
    def kept(self) -> str:
        """What is said where a run is stopped."""
        return describe_kept(self.work, "finished layers")


def describe_kept(work: Path | None, what: str) -> str:
    """Return what is kept of a run that is stopped, and how to go on."""
    if work is None:
        return f"{NOTHING_LEFT}, and nothing kept. With --work DIR, a run that is stopped goes on there"
    return f"{what} are in {work}: give the same command again to go on"


def parse_calibrations(text: str) -> tuple[Weighting, ...]:
    """Return the weightings of languages in a list with commas.

    Raises:
        ConfigError: an empty list, a name twice, or a word that is no way to weight languages.
    """
    names, known = parse_names(text.lower()), get_args(Weighting)
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise ConfigError(
            f"--calibrations {text!r}: name each one once, of {', '.join(known)}; write them with commas between, "
            "such as english,uniform"
        )
    return cast(tuple[Weighting, ...], names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What reading a model may do."""

    revision: Annotated[str | None, Option("Revision (commit hash) of a Hub model.", "More", metavar="HASH")] = None
    trust_remote_code: Annotated[bool, Option("Run code that the model's folder brings.", "More")] = False
    allow_pickle: Annotated[bool, Option("Read .bin weights, which can run code, if there are no others.", "More")] = (
        False
    )
    offline: Annotated[bool, Option("Open no connection: use what is on disk.", "More")] = False

    def source(self, model: str | None) -> ModelSource:
        """Return where the model comes from, and go offline where that is wanted: this comes before any reading.

        Raises:
            ConfigError: no model was given.
        """
        if self.offline:
            go_offline()
        return ModelSource(require_model(model), self.revision, self.trust_remote_code, self.allow_pickle)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How a result is printed."""

    as_json: Annotated[bool, Option("Print one JSON document instead of text.", "Output", flag="--json")] = False
    details: Annotated[bool, Option("Every interval and column, in a wide table.", "Output", flag="--details")] = False


def default_output(model: str, *, ending: str = "-int4-fair") -> Path:
    """Return a name in the current folder for what a model name, Hub id, folder or file is made to."""
    path = Path(model)
    name = path.resolve().parent.name if path.suffix == ".safetensors" else path.name or path.resolve().name
    return Path(name.removesuffix(".gguf") + ending)


def require_model(model: str | None) -> str:
    """Return the model's name, which these commands cannot do without.

    Raises:
        ConfigError: no model was given.
    """
    if not model:
        raise ConfigError("no model given; name one with --model, for example --model demo (bundled)")
    return model
