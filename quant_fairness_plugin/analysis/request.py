"""What an analysis is asked with. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from quant_fairness_plugin.analysis.lm_eval import parse_pair
from quant_fairness_plugin.artifacts import TextSet, package_versions
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_names
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel


def parse_sweeps(text: str) -> tuple[Path, ...]:
    """Return the files in a list with commas.

    Raises:
        ConfigError: an empty list or an empty name in it.

    >>> [path.name for path in parse_sweeps("a.json, b.json")]
    ['a.json', 'b.json']
    """
    names = parse_names(text)
    if not all(names):
        raise ConfigError(
            f"--sweep {text!r} holds an empty name; write files with commas between, such as a.json,b.json"
        )
    return tuple(map(Path, names))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisOptions:
    """What some analyses take and others do not; one that is given to another is refused."""

    sweep: Annotated[
        tuple[Path, ...] | None,
        Option(
            "A saved sweep of the model's layers to compare a score with; or several, of different models.",
            "Model",
            parse=parse_sweeps,
            metavar="FILE[,FILE]",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        Option("The quantized model. Default: all layers rounded to nearest.", "Model", metavar="DIR"),
    ] = None
    gold: Annotated[
        Path | None,
        Option(
            "Words split into morphemes, as TSV: language, un|happi|ness. Default: a small set of our own.",
            "Texts",
            metavar="FILE",
        ),
    ] = None
    questions: Annotated[
        Path | None,
        Option(
            "Questions with options: JSONL, a folder of CLAMS, or a TSV file of MultiBLiMP. Default: sentences of the "
            "text set against themselves with two words exchanged.",
            "Texts",
            metavar="PATH",
        ),
    ] = None
    lm_eval_samples: Annotated[
        tuple[Path, Path] | None,
        Option(
            "Sample logs of lm-eval to compare instead: the 16-bit model's and the quantized one's.",
            "Texts",
            parse=parse_pair,
            metavar="A,B",
        ),
    ] = None
    kinds: Annotated[
        tuple[str, ...] | None,
        Option(
            "Families of interventions, some of bits,keep,prune,heads,drop,prefix,patterns. Default: bits.",
            "What to sweep",
            flag="--kind",
            parse=parse_names,
            metavar="LIST",
        ),
    ] = None

    @property
    def given(self) -> tuple[str, ...]:
        """Return the names of the options that were given."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRequest:
    """One question about saved artifacts, which no model is needed for."""

    config: FairConfig
    options: AnalysisOptions
    progress: Callable[[int, int], None] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the options that were given, as plain data."""
        return {name: _plain(getattr(self.options, name)) for name in self.options.given}

    def provenance(self, *, reads_texts: bool) -> dict[str, Any]:
        """Return the provenance of the answer as plain data; the artifacts have their own."""
        known = {"versions": package_versions(), "arguments": self.arguments}
        return known | {"seed": self.config.seed, "draws": self.config.draws}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(SavedRequest):
    """One question about one model."""

    files: ModelFiles
    texts: TextSet
    load: Callable[[], LoadedModel]
    """Reads the weights of the model; an analysis that does without never calls it."""

    def provenance(self, *, reads_texts: bool) -> dict[str, Any]:
        """Return the provenance of the answer as plain data: versions, the model, and the texts where they are read."""
        known = {
            "versions": package_versions(),
            "model": self.files.name,
            "model_sha256": model_sha256(self.files),
            "arguments": self.arguments,
        }
        if not reads_texts:
            return known
        texts = {"text_set": self.texts.name, "text_sha256": self.texts.sha256, "languages": list(self.texts.languages)}
        return known | texts | {"seed": self.config.seed, "draws": self.config.draws}


def check_options(name: str, taken: tuple[str, ...], options: AnalysisOptions) -> None:
    """Refuse options that an analysis does not take.

    Raises:
        ConfigError: names them.
    """
    if wrong := [given for given in options.given if given not in taken]:
        named = ", ".join(map(_flag, wrong))
        accepted = ", ".join(map(_flag, taken)) or "none of them"
        raise ConfigError(f"analyze {name} does nothing with {named}; it takes {accepted}. Leave it out")


def _flag(name: str) -> str:
    return "--kind" if name == "kinds" else f"--{name.replace('_', '-')}"


def _plain(value: object) -> Any:
    """Paths become names: an answer must not differ by where its files lay."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return value.resolve().name if isinstance(value, Path) else value
