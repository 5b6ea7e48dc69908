"""A few sentences and requests that the tests of analyses share."""

from __future__ import annotations

from typing import Any

from quant_fairness_plugin.analysis.request import AnalysisOptions, Request
from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.model.load import LoadedModel

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": ("cedar lamp river", "stone", "bread window lamp"),
    "he": ("ארז מנורה", "נהר", "אבן לחם"),
}


def few_texts() -> TextSet:
    """Three parallel sentences, which are every part at once."""
    return TextSet(
        name="few",
        sentences=SENTENCES,
        ids=("1", "2", "3"),
        parts=("all",) * 3,
        registers=("",) * 3,
        parallel=True,
        sha256="0" * 64,
    )


def request_of(loaded: LoadedModel, *, texts: TextSet | None = None, options: dict[str, Any] | None = None) -> Request:
    """A request about a model that is loaded already, with few resamples."""
    return Request(
        files=loaded.files,
        texts=texts or few_texts(),
        config=FairConfig(draws=200, group_size=32),
        options=AnalysisOptions(**(options or {})),
        load=lambda: loaded,
    )
