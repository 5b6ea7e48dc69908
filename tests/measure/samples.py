"""Text sets and per-sentence scores made by hand, so that tests know the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quant_fairness_plugin.artifacts import LanguageScores, StateScores, TextSet

SENTENCES = {
    "en": "The fox number {} walks along the river, and nobody has asked where it is going.",
    "he": "השועל מספר {} הולך לאורך הנהר, ואיש לא שאל לאן הוא הולך.",
    "ar": "الثعلب رقم {} يمشي على طول النهر، ولم يسأل أحد إلى أين يذهب.",
    "zh": "第{}只狐狸沿着河边走，没有人问它要去哪里。",
}


def make_texts(sentences: Mapping[str, Sequence[str]]) -> TextSet:
    count = len(next(iter(sentences.values())))
    return TextSet(
        name="made",
        sentences={language: tuple(rows) for language, rows in sentences.items()},
        ids=tuple(f"s{i}" for i in range(count)),
        parts=("all",) * count,
        registers=("narrative",) * count,
        parallel=True,
        sha256="0" * 64,
    )


def numbered_texts(count: int = 40, languages: Sequence[str] = ("en", "he", "ar")) -> TextSet:
    return make_texts({language: [SENTENCES[language].format(i) for i in range(count)] for language in languages})


def make_scores(
    name: str,
    texts: TextSet,
    bits_per_byte: Mapping[str, float | Sequence[float]],
    *,
    kl_bits_per_byte: Mapping[str, float | Sequence[float]] | None = None,
    bytes_per_token: int = 4,
) -> StateScores:
    """Scores with the given bits per byte, for all sentences of a language or one by one."""
    return StateScores(
        state=name,
        languages={
            language: _language(
                texts.sentences[language],
                bits_per_byte[language],
                (kl_bits_per_byte or {}).get(language, 0.0),
                bytes_per_token,
            )
            for language in texts.languages
        },
    )


def _language(
    sentences: Sequence[str], bits: float | Sequence[float], kl: float | Sequence[float], bytes_per_token: int
) -> LanguageScores:
    nats_per_bit = 0.6931471805599453
    bytes_ = [len(sentence.encode()) for sentence in sentences]
    bits = [bits] * len(bytes_) if isinstance(bits, float) else bits
    kl = [kl] * len(bytes_) if isinstance(kl, float) else kl
    return LanguageScores(
        nll_nats=tuple(b * size * nats_per_bit for b, size in zip(bits, bytes_, strict=True)),
        tokens=tuple(size // bytes_per_token for size in bytes_),
        bytes_=tuple(bytes_),
        kl_nats=tuple(k * size * nats_per_bit for k, size in zip(kl, bytes_, strict=True)),
        flips=tuple(size // bytes_per_token // 5 for size in bytes_),
    )
