"""Texts: the languages, the sentences, and how much each language counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from quant_fairness_plugin.artifacts import Start, Weighting
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import parse_languages, parse_reference


@dataclass(frozen=True, kw_only=True)
class LanguageFields:
    """The fields of `FairConfig` that say what is measured and calibrated on."""

    languages: Annotated[
        tuple[str, ...] | None,
        Option(
            "Languages to measure, such as en,he,ar,zh. Default: all of the text set.",
            "Texts",
            flag="--langs",
            parse=parse_languages,
            metavar="LIST",
        ),
    ] = None
    reference: Annotated[
        str | None,
        Option(
            "Language that excess and disparity are measured against, or 'none'.",
            "Texts",
            parse=parse_reference,
            metavar="LANGUAGE",
        ),
    ] = "en"
    texts: Annotated[
        str,
        Option("'bundled', a JSON, JSONL or TSV file, a folder, or datasets:NAME.", "Texts", metavar="SOURCE"),
    ] = "bundled"
    calibration_texts: Annotated[
        str | None,
        Option(
            "Text to calibrate on instead of the texts' own part: JSONL rows, CSV, TSV, JSON or a folder, not "
            "necessarily parallel, chats too.",
            "Texts",
            metavar="SOURCE",
        ),
    ] = None
    start: Annotated[
        Start,
        Option(
            "What stands before every text that is measured: auto is what the tokenizer puts there, else what parts "
            "documents. Calibration takes all in turn.",
            "Texts",
        ),
    ] = "auto"
    tokens_per_language: Annotated[
        int | None,
        Option(
            "Calibration tokens of each language. Default: what the language with the fewest has, of the bundled texts "
            "at most 2048.",
            "Texts",
        ),
    ] = None
    tokens_per_expert: Annotated[
        int | None,
        Option(
            "Add calibration rows, of whichever language reaches them, until every expert of a mixture has so many "
            "tokens, as far as the text goes.",
            "Texts",
        ),
    ] = None
    calibration: Annotated[Weighting, Option("How much each language counts in calibration:", "Texts")] = "uniform"
