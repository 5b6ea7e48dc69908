from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.guards import ORDER, byte_ngram_bpb, byte_unigram_bpb, collapse, support, weakness
from quant_fairness_plugin.texts.load import load_texts

HEALTHY = {
    "nats_per_token": 3.0,
    "bits_per_byte": 1.2,
    "perplexity": 20.0,
    "baseline_perplexity": 18.0,
    "vocabulary": 4096,
}


def naive_unigram(sentences: list[str], folds: int) -> float:
    bits, total = 0.0, 0
    for index, sentence in enumerate(sentences):
        others = b"".join(other.encode() for i, other in enumerate(sentences) if i % folds != index % folds)
        for byte in sentence.encode():
            bits -= math.log2((others.count(byte) + 0.5) / (len(others) + 128))
            total += 1
    return bits / total


@pytest.mark.parametrize("count", [2, 3, 17])
def test_unigram_bits_equal_those_counted_byte_by_byte(count: int) -> None:
    sentences = [f"Satz {i}: שועל {i * i}, 狐 und noch mehr" for i in range(count)]
    assert byte_unigram_bpb(sentences) == pytest.approx(naive_unigram(sentences, 5))


def test_unigram_is_cross_fitted_and_learns_nothing_from_the_sentence_itself() -> None:
    assert byte_unigram_bpb(["a" * 100, "b" * 100]) > 7.0  # each byte is unseen in the other sentence
    assert byte_unigram_bpb(["a" * 100, "a" * 100]) < 1.5


def test_unigram_of_random_bytes_is_about_eight_bits() -> None:
    letters = np.random.default_rng(0).integers(0, 128, (50, 400))
    assert byte_unigram_bpb(["".join(map(chr, row)) for row in letters]) == pytest.approx(7.0, abs=0.1)


@pytest.mark.parametrize(("sentences", "folds"), [(["one"], 5), ([], 5), (["one", "two"], 1)])
def test_unigram_needs_two_sentences_and_folds(sentences: list[str], folds: int) -> None:
    with pytest.raises(ConfigError, match="at least 2 of each"):
        byte_unigram_bpb(sentences, folds)


def test_unigram_of_empty_sentences_is_an_error() -> None:
    with pytest.raises(ConfigError, match="all sentences are empty"):
        byte_unigram_bpb(["", ""])


def naive_ngram(sentences: list[str], folds: int) -> float:
    """Bits per byte by counts in dictionaries, sentence by sentence."""
    bits, total = 0.0, 0
    for index, sentence in enumerate(sentences):
        followers: dict[bytes, Counter[int]] = defaultdict(Counter)
        for other in (text for i, text in enumerate(sentences) if i % folds != index % folds):
            content = bytes(ORDER - 1) + other.encode()
            for end in range(ORDER - 1, len(content)):
                for length in range(ORDER):
                    followers[content[end - length : end]][content[end]] += 1
        content = bytes(ORDER - 1) + sentence.encode()
        for end in range(ORDER - 1, len(content)):
            probability = 1 / 256
            for length in range(ORDER):
                if seen := followers.get(content[end - length : end]):
                    different = len(seen)
                    mixed = seen[content[end]] + different * probability
                    probability = mixed / (seen.total() + different)
            bits -= math.log2(probability)
            total += 1
    return bits / total


@pytest.mark.parametrize("count", [2, 3, 17])
def test_ngram_bits_equal_those_counted_byte_by_byte(count: int) -> None:
    sentences = [f"Satz {i}: שועל {i * i}, 狐 und noch mehr" for i in range(count)]
    assert byte_ngram_bpb(sentences) == pytest.approx(naive_ngram(sentences, 5))


def test_ngram_is_cross_fitted() -> None:
    assert byte_ngram_bpb(["abc" * 40, "xyz" * 40]) > 7.0
    assert byte_ngram_bpb(["abc" * 40, "abc" * 40]) < 0.5


@pytest.mark.parametrize(
    ("sentences", "message"), [(["one"], "at least 2"), (["", ""], "all sentences are empty"), ([], "at least 2")]
)
def test_ngram_needs_text(sentences: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        byte_ngram_bpb(sentences)


def test_a_byte_ngram_does_not_pass_as_fluent_in_any_bundled_language() -> None:
    for sentences in load_texts("bundled").part("confirm").sentences.values():
        learned = byte_ngram_bpb(sentences)
        assert weakness(learned, learned) is not None
        assert support(learned, byte_unigram_bpb(sentences)) is None  # though it is far better than counting bytes
        assert weakness(0.9 * learned, learned) is None


def test_support_needs_a_model_better_than_counting_bytes() -> None:
    assert support(1.9, 4.5) is None
    assert "no better than counting bytes" in (support(4.5, 4.5) or "")


def test_a_healthy_state_has_not_collapsed() -> None:
    assert collapse(**HEALTHY) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nats_per_token": 0.9 * math.log(4096)}, "chance"),
        ({"bits_per_byte": 8.0}, "no better than random bytes"),
        ({"perplexity": 180.1}, "more than 10 times"),
    ],
)
def test_each_collapse_guard_fires_alone(changes: dict[str, float], reason: str) -> None:
    assert reason in (collapse(**(HEALTHY | changes)) or "")


@pytest.mark.parametrize("changes", [{"nats_per_token": 7.48}, {"bits_per_byte": 7.99}, {"perplexity": 180.0}])
def test_collapse_guards_do_not_fire_just_below_their_bounds(changes: dict[str, float]) -> None:
    assert collapse(**(HEALTHY | changes)) is None
