"""The seeds' figures, so that published numbers can be made again: perplexity of one short text, six "disparities".

Nothing is ranked by them. Where the seeds' code put an arbitrary number, a figure is `Undefined`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.seeds.texts import DEFAULT_TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Fallback = Literal["undefined", "legacy-one", "legacy-infinity", "legacy-zero"]
"""What a ratio with a denominator of 0 or less becomes.

`legacy-one` divides by 1 % instead (the package), `legacy-infinity` is infinite (exp013, 027, 072, 080), and
`legacy-zero` is 0, which reads as perfect (exp046 to exp061).
"""
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)


@dataclass(frozen=True, slots=True)
class Groups:
    """Which language plays which role in a formula; the defaults are those of the seeds' experiment 022."""

    reference: str = "en"
    high_resource: tuple[str, ...] = ("en", "de", "fr")
    low_resource: tuple[str, ...] = ("zh", "ar", "he")


Ratio = Callable[[float, float], float | Undefined]
"""Divides numerator by denominator, with the fallback that the caller gave."""


@dataclass(frozen=True, slots=True)
class DisparityFormula:
    """One of the seeds' definitions of disparity."""

    name: str
    formula: str
    source: str
    takes: Literal["degradation", "quality"]
    """Degradation: percent change of perplexity by language. Quality: percent of the original score retained."""
    evaluate: Callable[[Mapping[str, float], Groups, Ratio], float | Undefined]


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Return the exponential of the mean loss that Transformers computes on one text, in the seeds' way.

    No BOS is prepended beyond what the tokenizer itself adds (nothing for GPT-2, `</s>` for OPT), there is no window,
    and the first token is never scored. May be infinite: the exponential is taken in float32.

    Raises:
        ConfigError: the text has fewer than two tokens, so that nothing is predicted.
    """
    import torch

    from quant_fairness_plugin.model.load import quiet_transformers

    encoded = tokenizer(text, return_tensors="pt").to(model.device)
    ids = encoded["input_ids"]
    if ids.shape[1] < 2:
        raise ConfigError(f"text {text!r} has fewer than 2 tokens: the loss is undefined. Give a longer text.")
    with torch.no_grad(), quiet_transformers():  # it remarks on the loss of every config
        loss = model(input_ids=ids, attention_mask=encoded["attention_mask"], labels=ids, use_cache=False).loss
    return float(torch.exp(loss).item())


def perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str] = DEFAULT_TEXTS
) -> dict[str, float]:
    """Return the legacy perplexity of one text per language."""
    return {language: perplexity(model, tokenizer, text) for language, text in texts.items()}


def disparity(
    name: str, values: Mapping[str, float], *, groups: Groups | None = None, fallback: Fallback = "undefined"
) -> float | Undefined:
    """Return one of the seeds' disparities by name.

    Args:
        name: a key of `DISPARITY_FORMULAS`.
        values: by language, in percent; the formula's `takes` says what they are.
        groups: reference, high-resource and low-resource languages; those of a group without a value are left out.
        fallback: what a ratio with a denominator of 0 or less becomes. The legacy ones reproduce published tables.

    Raises:
        ConfigError: an unknown formula or fallback, or a value that is not finite.
        UnknownLanguageError: the reference has no value.
    """
    groups = groups or Groups()
    if name not in DISPARITY_FORMULAS:
        raise ConfigError(f"disparity {name!r} is not known; use one of {', '.join(DISPARITY_FORMULAS)}")
    if fallback not in FALLBACKS:
        raise ConfigError(f"fallback {fallback!r} is not known; use one of {', '.join(FALLBACKS)}")
    infinite = [language for language, value in values.items() if not math.isfinite(value)]
    if infinite:
        raise ConfigError(f"values of {', '.join(infinite)} are not finite; leave these languages out and say so")
    if groups.reference not in values:
        raise UnknownLanguageError(
            f"reference {groups.reference!r} has no value; there are {', '.join(values) or 'none'}"
        )
    return DISPARITY_FORMULAS[name].evaluate(values, groups, _ratio(fallback))


def _ratio(fallback: Fallback) -> Ratio:
    def divide(numerator: float, denominator: float) -> float | Undefined:
        if denominator > 0:
            return numerator / denominator
        match fallback:
            case "legacy-one":
                return numerator
            case "legacy-infinity":
                return math.inf
            case "legacy-zero":
                return 0.0
        return Undefined(f"the denominator is {denominator:.4g} %, not above 0")

    return divide


def _mean_of_ratios(
    values: Mapping[str, float], languages: Sequence[str], reference: str, ratio: Ratio
) -> float | Undefined:
    present = [language for language in languages if language in values]
    if not present:
        return Undefined(f"none of the languages to compare with {reference} has a value")
    ratios = [ratio(values[language], values[reference]) for language in present]
    undefined = [value for value in ratios if isinstance(value, Undefined)]
    return undefined[0] if undefined else fmean(value for value in ratios if not isinstance(value, Undefined))


def _others(values: Mapping[str, float], reference: str) -> list[str]:
    return [language for language in values if language != reference]


def _group_mean(values: Mapping[str, float], languages: Sequence[str]) -> float | None:
    present = [values[language] for language in languages if language in values]
    return fmean(present) if present else None


def _mean_over_others(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    return _mean_of_ratios(values, _others(values, groups.reference), groups.reference, ratio)


def _ratio_of_group_means(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    low, high = _group_mean(values, groups.low_resource), _group_mean(values, groups.high_resource)
    if low is None or high is None:
        return Undefined(f"no value for any {'low' if low is None else 'high'}-resource language")
    return ratio(low, high)


def _hebrew_over_reference(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    return ratio(values["he"], values[groups.reference]) if "he" in values else Undefined("Hebrew (he) has no value")


def _range(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    return max(values.values()) - min(values.values())


def _ratio_of_losses(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    losses = {language: 100.0 - quality for language, quality in values.items()}
    return _ratio_of_group_means(losses, groups, ratio)


def _mean_over_low_resource(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    return _mean_of_ratios(values, groups.low_resource, groups.reference, ratio)


def _largest_ratio(values: Mapping[str, float], groups: Groups, ratio: Ratio) -> float | Undefined:
    others = _others(values, groups.reference)
    if not others:
        return Undefined(f"no language other than the reference {groups.reference} has a value")
    return ratio(max(values[language] for language in others), values[groups.reference])


DISPARITY_FORMULAS: Mapping[str, DisparityFormula] = MappingProxyType(
    {
        formula.name: formula
        for formula in (
            DisparityFormula(
                "D1",
                "mean over languages l other than en of deg(l) / deg(en)",
                "package quant_fairness (quantize.py, sweep.py), exp080, the paper page",
                "degradation",
                _mean_over_others,
            ),
            DisparityFormula(
                "D2",
                "mean deg of low-resource languages / mean deg of high-resource languages",
                "exp010, exp022, run_pipeline, the main README",
                "degradation",
                _ratio_of_group_means,
            ),
            DisparityFormula(
                "D3",
                "deg(he) / deg(en)",
                "phase-4 series exp002-007, phase-5 exp011-021: the 160x and 214x figures",
                "degradation",
                _hebrew_over_reference,
            ),
            DisparityFormula(
                "D4",
                "max deg - min deg, over all languages",
                "lib/metrics.py, theory notes, Colab methodology",
                "degradation",
                _range,
            ),
            DisparityFormula(
                "D5",
                "(100 - mean quality of low-resource languages) / (100 - mean quality of high-resource languages)",
                "Track C, experiment C-009",
                "quality",
                _ratio_of_losses,
            ),
            DisparityFormula(
                "D6",
                "mean over low-resource languages l of deg(l) / deg(en)",
                "exp027, exp030-034 (he and ar, sometimes zh)",
                "degradation",
                _mean_over_low_resource,
            ),
            DisparityFormula(
                "max",
                "max over languages l other than en of deg(l) / deg(en)",
                "gpu-experiments disparity.py",
                "degradation",
                _largest_ratio,
            ),
        )
    }
)
"""The seeds' definitions of disparity by name; deg(l) is the percent change of token perplexity of language l."""
