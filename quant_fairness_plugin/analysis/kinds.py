"""The analyses by name: a new one is a file with `analyse(request)` and an entry here. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.analysis.request import SavedRequest, check_options
from quant_fairness_plugin.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Analysis:
    """One question, and the module that answers it."""

    name: str
    question: str
    takes: tuple[str, ...] = ()
    """Options of `AnalysisOptions` that it reads."""
    reads_texts: bool = True
    reads_model: bool = True
    """Otherwise it takes none, and its module's `analyse` takes a `SavedRequest`."""

    def run(self, request: SavedRequest) -> Any:
        """Return the answer, a frozen dataclass.

        Raises:
            ConfigError: an option that this analysis does not take.
        """
        check_options(self.name, self.takes, request.options)
        module = importlib.import_module(f"quant_fairness_plugin.analysis.{self.name}")  # some load torch
        analyse: Callable[[Any], Any] = module.analyse
        return analyse(request)


ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "weights",
            "How are the weights of each layer and tensor kind distributed, and does that predict a sweep?",
            takes=("sweep",),
            reads_texts=False,
        ),
        Analysis(
            "tokens",
            "How many tokens do the same sentences take in each language, and do tokens follow morphemes?",
            takes=("gold",),
        ),
        Analysis(
            "representations",
            "What does quantization do to the hidden states of each layer and language, and where is their energy?",
            takes=("checkpoint",),
        ),
        Analysis(
            "interventions",
            "What do fewer bits, pruning, leaving out heads or layers, or 16 bit up to a layer do to each language?",
            takes=("kinds",),
        ),
        Analysis(
            "choices",
            "Does the quantized model still choose the right one of several texts, in every language?",
            takes=("questions", "lm_eval_samples", "checkpoint"),
        ),
        Analysis(
            "hypotheses",
            "Which figures of the languages (tokens, morphemes, outliers, training share) go with their damage?",
            takes=("gold", "checkpoint"),
        ),
        Analysis(
            "configurations",
            "What do the research scripts' configurations cost and do, and which of them are worth their bytes?",
        ),
        Analysis("clipping", "Would one clipping threshold for all languages hurt some of them, layer by layer?"),
        Analysis(
            "depth",
            "Do layers at the same relative depth matter alike in different models, and gateway layers most?",
            takes=("sweep",),
            reads_texts=False,
            reads_model=False,
        ),
    )
}


def find_analysis(name: str) -> Analysis:
    """Return the analysis of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ANALYSES:
        raise ConfigError(f"there is no analysis {name!r}; use one of {', '.join(ANALYSES)} (analyze --list)")
    return ANALYSES[name]
