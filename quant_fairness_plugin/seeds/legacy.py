"""The seeds' measurement and sweep by the name of a model: what `--method legacy` runs.

Perplexities of one sentence a language, one scale per tensor, ratios of perplexity changes, and no interval anywhere.
The weights are rounded to 16 bit first, as everywhere in this package; the seeds began with float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quant_fairness_plugin.artifacts import Interval, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds.disparity import DISPARITY_FORMULAS, Groups, disparity, perplexities
from quant_fairness_plugin.seeds.simulation import simulate_int4, undo_simulation
from quant_fairness_plugin.seeds.texts import DEFAULT_TEXTS, SEED_LANGUAGES
from quant_fairness_plugin.statistics.labels import legacy_label
from quant_fairness_plugin.steps import exported_state
from quant_fairness_plugin.texts.languages import choose_languages, script_name
from quant_fairness_plugin.texts.load import load_texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Figure = float | Undefined


@dataclass(frozen=True, slots=True)
class LegacyLanguage:
    """One language; perplexities of one sentence, by token."""

    language: str
    before: Figure
    after: Figure
    degradation: Figure
    """Percent change of the perplexity."""
    script: str
    relative: Figure
    """Degradation over that of the reference; undefined where that one does not get worse."""
    label: str
    """The seeds' word for it; there is no interval that another could go by."""


@dataclass(frozen=True, slots=True)
class LegacyDisparity:
    """One of the seeds' definitions of disparity."""

    name: str
    formula: str
    value: Figure


@dataclass(frozen=True, slots=True)
class LegacyMeasurement:
    """A quantized model by the seeds' figures. Nothing here has an interval, and nothing is ranked by it."""

    model: str
    quantized: str
    """`simulated` (Q1: one INT4 scale per tensor, everything), or the checkpoint's folder."""
    reference: str
    languages: tuple[LegacyLanguage, ...]
    disparities: tuple[LegacyDisparity, ...]


def legacy_texts(config: FairConfig) -> dict[str, str]:
    """Return one text per language: the seeds' sentences for `bundled`, else the only row of a text set.

    Raises:
        ConfigError: no reference language, or a text set of several sentences.
        UnknownLanguageError: a language without a sentence.
    """
    if config.reference is None:
        raise ConfigError("--reference none: the research scripts' disparities are ratios to a language; name one")
    if config.texts == "bundled":
        wanted = SEED_LANGUAGES if config.languages is None else config.languages
        names = choose_languages(
            tuple(DEFAULT_TEXTS), languages=wanted, reference=config.reference, source="of the research scripts"
        )
        return {name: DEFAULT_TEXTS[name] for name in names}
    texts = load_texts(config.texts, languages=config.languages, reference=config.reference)
    if len(texts) != 1:
        raise ConfigError(
            f"--texts {config.texts}: {len(texts)} sentences a language; --method legacy takes one, as in "
            '{"en": "Fox.", "he": "שועל."}. Leave --method out to measure on all of them'
        )
    return {language: rows[0] for language, rows in texts.sentences.items()}


def measure_legacy(
    loaded: LoadedModel, texts: Mapping[str, str], reference: str, checkpoint: Path | None = None
) -> LegacyMeasurement:
    """Measure a checkpoint, or the seeds' INT4 simulation of the model, by all of the seeds' disparities.

    Args:
        loaded: the 16-bit model; bit-identical afterwards.
        texts: one text per language.
        reference: the language that others are compared with.
        checkpoint: a folder made from this model; None simulates.

    Raises:
        ConfigError: a text of fewer than two tokens.
    """
    before = perplexities(loaded.model, loaded.tokenizer, texts)
    state = _simulated(loaded.model) if checkpoint is None else exported_state(checkpoint, loaded).applied()
    with state as model:
        after = perplexities(model, loaded.tokenizer, texts)
    known = disparities_by_language(before, after, reference)
    rows = tuple(_language(name, before[name], after[name], known[name], reference) for name in texts)
    quantized = "simulated" if checkpoint is None else checkpoint.resolve().name
    return LegacyMeasurement(loaded.files.name, quantized, reference, rows, legacy_disparities(rows, reference))


def legacy_disparities(rows: tuple[LegacyLanguage, ...], reference: str) -> tuple[LegacyDisparity, ...]:
    """Return D1 to D6 and the maximum; all undefined where a perplexity is infinite.

    What retains quality (D5) is the perplexity before over that after, in percent.
    """
    infinite = [row.language for row in rows if isinstance(row.degradation, Undefined)]
    groups, disparities = Groups(reference=reference), []
    for name, record in DISPARITY_FORMULAS.items():
        if infinite:
            value: Figure = Undefined(f"the perplexity of {', '.join(infinite)} is infinite in float32")
        else:
            change = {row.language: _finite(row.degradation) for row in rows}
            retained = {language: 100.0 / (1.0 + percent / 100.0) for language, percent in change.items()}
            value = disparity(name, change if record.takes == "degradation" else retained, groups=groups)
        disparities.append(LegacyDisparity(name, record.formula, value))
    return tuple(disparities)


@contextmanager
def _simulated(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    simulate_int4(model)
    try:
        yield model
    finally:
        undo_simulation(model)


def disparities_by_language(
    before: Mapping[str, float], after: Mapping[str, float], reference: str
) -> dict[str, Figure]:
    """Return every language's percent change of perplexity over that of the reference."""
    base = _change(before[reference], after[reference])
    if isinstance(base, Undefined) or base <= 0:
        reason = base.undefined if isinstance(base, Undefined) else f"it changes by {base:.3g} %, not above 0"
        return dict.fromkeys(before, Undefined(f"{reference}: {reason}"))
    changes = {name: _change(before[name], after[name]) for name in before}
    return {name: change if isinstance(change, Undefined) else change / base for name, change in changes.items()}


def _language(name: str, before: float, after: float, relative: Figure, reference: str) -> LegacyLanguage:
    known = [Undefined("infinite in float32") if math.isinf(value) else value for value in (before, after)]
    label = "undefined" if isinstance(relative, Undefined) else legacy_label(Interval(relative, relative, relative))
    return LegacyLanguage(
        language=name,
        before=known[0],
        after=known[1],
        degradation=_change(before, after),
        script=script_name(name),
        relative=relative,
        label="Reference" if name == reference else label,
    )


def _change(before: float, after: float) -> Figure:
    if math.isinf(before) or math.isinf(after):
        return Undefined("infinite in float32")
    return percent_change(before, after)


def _finite(value: Figure) -> float:
    assert not isinstance(value, Undefined)
    return value
