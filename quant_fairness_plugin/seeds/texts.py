"""What the seeds measured on: one sentence a language; and the text sets that take its place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.texts.load import load_texts

Method = Literal["rigorous", "legacy"]
SEED_LANGUAGES = ("en", "he", "ar", "zh")
"""The languages of the seeds' package where none are given."""

DEFAULT_TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "en": "The quick brown fox jumps over the lazy dog near the river bank.",
        "de": "Der schnelle braune Fuchs springt über den faulen Hund nahe dem Flussufer.",
        "fr": "Le rapide renard brun saute par-dessus le chien paresseux près de la rive du fleuve.",
        "es": "El rápido zorro marrón salta sobre el perro perezoso cerca de la orilla del río.",
        "he": "השועל החום המהיר קופץ מעל הכלב העצלן ליד גדת הנהר.",
        "ar": "يقفز الثعلب البني السريع فوق الكلب الكسول بالقرب من ضفة النهر.",
        "zh": "敏捷的棕色狐狸在河岸边跳过了那只懒狗。",
        "ja": "素早い茶色の狐が、川岸の近くで怠け者の犬を飛び越えます。",
        "ko": "빠른 갈색 여우가 강둑 근처에서 게으른 개를 뛰어넘습니다.",
        "ru": "Быстрая коричневая лиса перепрыгивает через ленивую собаку у берега реки.",
    }
)
"""One sentence in each of the seeds' ten languages: far too little to conclude from."""

SERIES_TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "en": "The quick brown fox jumps over the lazy dog.",
        "he": "השועל החום המהיר קופץ מעל הכלב העצלן.",
    }
)
"""The texts of the seeds' phase-4 series, which their published GPT-2 and OPT figures (214x, 153x) belong to."""

LEDGER_TEXTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "one word": MappingProxyType({"en": "Fox.", "he": "שועל."}),
        "three words": MappingProxyType({"en": "The fox jumps.", "he": "השועל קופץ."}),
        "series": SERIES_TEXTS,
        "package": MappingProxyType({language: DEFAULT_TEXTS[language] for language in SEED_LANGUAGES}),
        "ten": DEFAULT_TEXTS,
    }
)
"""The texts of the seeds' experiments by name. "one word" leaves one English token to predict, in GPT-2's tokens."""


def text_set(texts: Mapping[str, str] | TextSet | None, reference: str) -> TextSet:
    """Return the texts of a rigorous measurement: the given set, or the bundled one in the seeds' languages.

    Raises:
        ConfigError: one text per language.
    """
    if texts is None:
        return load_texts("bundled", languages=SEED_LANGUAGES, reference=reference)
    if not isinstance(texts, TextSet):
        raise ConfigError(
            'one text per language is too little to measure: give a TextSet (load_texts), or method="legacy"'
        )
    return texts


def one_text_each(texts: Mapping[str, str] | TextSet | None) -> Mapping[str, str]:
    """Return the texts of a legacy measurement: the given one per language, or the seeds' sentences.

    Raises:
        ConfigError: a `TextSet`.
    """
    if isinstance(texts, TextSet):
        raise ConfigError('method="legacy" takes one text per language, such as {"en": "...", "he": "..."}')
    return {language: DEFAULT_TEXTS[language] for language in SEED_LANGUAGES} if texts is None else texts
