"""What a command works on, in tokens and shapes, from a model's files and a text set; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast, get_args

from quant_fairness_plugin.artifacts import Part, TextSet
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast.commands import Job, key_values
from quant_fairness_plugin.forecast.passes import Text, count_text
from quant_fairness_plugin.measure.rows import TokenRows, tokenize
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.tokenizer import check_vocabulary, counting_tokenizer, is_plain
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT
from quant_fairness_plugin.texts.documents import ENOUGH_TOKENS
from quant_fairness_plugin.texts.sources import BUNDLED

UNKNOWN_TOKENS = 1 << 24
"""More than hidden states are held of in memory, where how much is calibrated on is not known before."""


def memory_job(
    files: ModelFiles,
    outline: Outline,
    config: FairConfig,
    texts: TextSet,
    tokenized: Mapping[Part, TokenRows],
    *,
    budget: int | None,
) -> Job:
    """Return what the memory of a command follows from.

    Args:
        files: the model's files.
        outline: the model's shapes.
        config: of the command, with a group size that fits the model.
        texts: the whole text set.
        tokenized: from `tokenize_parts`.
        budget: the memory budget in bytes.
    """
    own, vocabulary = files.config.get("text_config"), files.folder / "tokenizer.json"
    return Job(
        outline=outline, config=config, languages=texts.languages, budget=budget,
        tokenizer=vocabulary.stat().st_size if vocabulary.is_file() else 0,
        calibrated=calibrated_tokens(tokenized["calibrate"], config) or UNKNOWN_TOKENS,
        confirm=count_part(tokenized, texts, "confirm"), search=count_part(tokenized, texts, "search"),
        key_values=key_values(outline, own if isinstance(own, dict) else files.config),
        streams=bool(files.weights) and files.weights[0].suffix == ".safetensors",
    )  # fmt: skip


def tokenize_parts(
    files: ModelFiles, outline: Outline, texts: TextSet, *, trust_remote_code: bool
) -> Mapping[Part, TokenRows]:
    """Return every part of a text set in tokens of the model.

    Raises:
        ArtifactError: a tokenizer that does not load, or tokens that the model has no embedding for.
        UnsupportedModelError: as `tokenize`.
    """
    tokenizer = counting_tokenizer(files, trust_remote_code=trust_remote_code, templates=texts.start == "chat")
    if not is_plain(files):  # else `preflight` did
        check_vocabulary(tokenizer, texts, rows=outline.vocabulary, name=files.name)
    context = min(CONTEXT, outline.positions)
    return {part: tokenize(cast(Any, tokenizer), texts.part(part), context=context) for part in get_args(Part)}


def count_part(tokenized: Mapping[Part, TokenRows], texts: TextSet, part: Part) -> Text:
    """Return the tokens and batches of a part."""
    return count_text(tokenized[part], texts.part(part), batch_tokens=BATCH_TOKENS)


def calibrated_tokens(tokenized: TokenRows, config: FairConfig) -> int | None:
    """Return how many tokens of all languages are calibrated on; line ends and beginnings are not counted.

    None where documents say it that are not read here.
    """
    bundled = config.texts == BUNDLED and config.calibration_texts is None
    given = config.tokens_per_language or (ENOUGH_TOKENS if bundled else None)
    if (config.calibration_texts is not None and given is None) or (bundled and config.calibration == "proportional"):
        return None
    counts = Counter[str]()
    for row in tokenized.rows:
        counts[row.language] += len(row.ids)
    if config.calibration == "proportional":
        return counts.total()
    languages = 1 if config.calibration == "english" else len(counts)
    return languages * (given or min(counts.values()))
