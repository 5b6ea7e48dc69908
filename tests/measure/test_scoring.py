from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributions import Categorical, kl_divergence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from quant_fairness_plugin.artifacts import StateScores, TextSet
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure import rows, streamed
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state, score_states
from quant_fairness_plugin.model.devices import ByDevice
from tests.measure.samples import make_texts
from tests.tiny import byte_tokenizer, tiny_config

# Sentences of 1, 17, 33 and 63 bytes, and two in scripts of 2 and 3 bytes a character.
LENGTHS = (1, 17, 33, 63)
TEXTS = make_texts(
    {
        "en": [("the quick brown fox jumps over the lazy dog near the river banks" * 2)[:n] for n in LENGTHS],
        "he": ["ש", "השועל החום", "מהיר", "גדת הנהר ליד הכלב העצלן"],
        "zh": ["狐", "敏捷的棕色狐狸", "懒狗。", "在河岸边跳过了那只懒狗"],
    }
)
RELATIVE = 2e-5
"""float32 matrix products in another batch shape differ by about 1e-6 a layer."""


class Loaded(NamedTuple):
    model: PreTrainedModel
    other: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt", "bloom"])
def loaded(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Loaded:
    folder = tiny_model(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Loaded(model, disturbed(model), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[..., Path]) -> Loaded:
    folder = tiny_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Loaded(model, disturbed(model), AutoTokenizer.from_pretrained(folder))


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return other


def plain_tokenizer(vocabulary: dict[str, int] | None = None, unknown: str | None = None) -> PreTrainedTokenizerFast:
    """Without BOS and EOS: one token per byte, or the merges that the vocabulary allows."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary or alphabet, [], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)


def score(pair: Loaded, texts: TextSet = TEXTS, **limits: int) -> tuple[StateScores, StateScores]:
    states = [fixed_state("16 bit", pair.model), fixed_state("none", pair.other)]
    found = score_states(states, pair.tokenizer, texts, **limits)
    return found["16 bit"], found["none"]


def naive(pair: Loaded, sentence: str) -> tuple[float, float, float, int]:
    """NLL of both models, KL and flips of one sentence: one forward pass each, no batch, BOS first."""
    ids = [0, *pair.tokenizer.encode(sentence, add_special_tokens=False)]
    with torch.no_grad():
        p, q = (m(input_ids=torch.tensor([ids])).logits[0, :-1].double() for m in (pair.model, pair.other))
    targets = torch.tensor(ids[1:])
    first, second = Categorical(logits=p), Categorical(logits=q)
    kl = kl_divergence(first, second).sum().item()
    flips = int((p.argmax(-1) != q.argmax(-1)).sum())
    return -first.log_prob(targets).sum().item(), -second.log_prob(targets).sum().item(), kl, flips


@pytest.mark.parametrize("batch_tokens", [1, 100, 2048])
def test_scores_equal_one_sentence_at_a_time(loaded: Loaded, batch_tokens: int) -> None:
    before, after = score(loaded, batch_tokens=batch_tokens)
    flips = 0
    for language, sentences in TEXTS.sentences.items():
        old, new = before.languages[language], after.languages[language]
        for i, sentence in enumerate(sentences):
            nll, changed_nll, kl, flipped = naive(loaded, sentence)
            assert old.nll_nats[i] == pytest.approx(nll, rel=RELATIVE)
            assert new.nll_nats[i] == pytest.approx(changed_nll, rel=RELATIVE)
            assert new.kl_nats[i] == pytest.approx(kl, rel=1e-3, abs=1e-5)
            assert new.flips[i] == flipped
            flips += flipped
        assert old.bytes_ == new.bytes_ == old.tokens == tuple(len(sentence.encode()) for sentence in sentences)
    assert flips > 0  # otherwise the comparison of flips would say nothing


def test_the_first_state_has_no_divergence_from_itself_and_a_copy_has_none_either(llama: Loaded) -> None:
    states = [fixed_state("16 bit", llama.model), fixed_state("copy", llama.model)]
    found = score_states(states, llama.tokenizer, TEXTS)
    assert found["copy"].languages == found["16 bit"].languages
    for scores in found["16 bit"].languages.values():
        assert set(scores.kl_nats) == {0.0}
        assert set(scores.flips) == {0}


def test_garbage_in_the_padding_does_not_matter(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = score(loaded)
    monkeypatch.setattr(rows, "PAD", 263)
    assert score(loaded) == clean


def test_the_model_is_told_which_tokens_are_padding_and_keeps_no_cache(
    llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    forward = llama.model.forward

    def record(**arguments: Any) -> Any:
        calls.append(arguments)
        return forward(**arguments)

    monkeypatch.setattr(llama.model, "forward", record)
    score_states([fixed_state("16 bit", llama.model)], llama.tokenizer, TEXTS)
    calls = calls[1:]  # the first one shows what the model does to the output of its head, on one token
    lengths = sorted(len(sentence.encode()) + 1 for rows in TEXTS.sentences.values() for sentence in rows)
    assert sorted(row for call in calls for row in call["attention_mask"].sum(dim=1).tolist()) == lengths
    for call in calls:
        assert (call["attention_mask"].diff(dim=1) <= 0).all()  # ones first, then zeros: padded on the right
        assert call["use_cache"] is False


def test_divergence_of_nearly_equal_states_is_never_negative(llama: Loaded) -> None:
    other = copy.deepcopy(llama.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1 + 3e-7)
    for scores in score(llama._replace(other=other))[1].languages.values():
        assert min(scores.kl_nats) >= 0


def test_comparing_in_small_pieces_changes_nothing(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(llama)
    monkeypatch.setattr(streamed, "PIECE_ELEMENTS", ByDevice(cpu=7 * 31, accelerator=0))
    monkeypatch.setattr(streamed, "SLICE_COLUMNS", ByDevice(cpu=31, accelerator=0))
    pieces = score(llama)
    for language in TEXTS.languages:
        found, expected = pieces[1].languages[language], whole[1].languages[language]
        assert found.nll_nats == pytest.approx(expected.nll_nats, rel=1e-6)
        assert found.kl_nats == pytest.approx(expected.kl_nats, rel=1e-5)
        assert found.flips == expected.flips


def naive_windows(model: PreTrainedModel, ids: list[int], room: int, prefix: list[int]) -> float:
    """NLL of every token from the first window that holds it; windows move on by half."""
    total, start, done = 0.0, 0, 0 if prefix else 1
    while done < len(ids):
        chunk = prefix + ids[start : start + room]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=torch.tensor([chunk])).logits[0].double(), -1)
        for position in range(done, min(start + room, len(ids))):
            total -= log_p[position - start + len(prefix) - 1, ids[position]].item()
        done = min(start + room, len(ids))
        start += room // 2
    return total


@pytest.mark.parametrize("length", [7, 8, 15, 16, 17, 33, 63])
def test_text_longer_than_the_model_is_read_in_windows_and_each_token_counted_once(length: int) -> None:
    torch.manual_seed(0)
    config = tiny_config("gpt2", layers=2, width=32)
    config.n_positions = 16
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = make_texts({"en": ["x" + "abcdefghij klm nop"[: 1 + length % 9] * 20, ("river bank " * 9)[:length]]})
    tokenizer = byte_tokenizer()
    found = score_states([fixed_state("16 bit", model)], tokenizer, texts)["16 bit"].languages["en"]
    for i, sentence in enumerate(texts.sentences["en"]):
        ids = tokenizer.encode(sentence, add_special_tokens=False)
        assert found.tokens[i] == found.bytes_[i] == len(sentence)
        assert found.nll_nats[i] == pytest.approx(naive_windows(model, ids, 15, [0]), rel=RELATIVE)


def test_a_shorter_context_can_be_asked_for(llama: Loaded) -> None:
    sentence = TEXTS.sentences["en"][3]
    texts = make_texts({"en": [sentence]})
    found, _ = score(llama, texts, context=10)
    ids = llama.tokenizer.encode(sentence, add_special_tokens=False)
    assert found.languages["en"].nll_nats[0] == pytest.approx(naive_windows(llama.model, ids, 9, [0]), rel=RELATIVE)
    assert found != score(llama, texts)[0]


@pytest.mark.parametrize("context", [8, 2048])
def test_without_bos_and_eos_the_first_token_and_its_bytes_are_left_out(llama: Loaded, context: int) -> None:
    texts = make_texts({"en": ["ab", "fox and dog"], "he": ["שועל", "הכלב"]})
    pair = llama._replace(tokenizer=plain_tokenizer())
    before, after = score(pair, texts, context=context)
    for language, sentences in texts.sentences.items():
        scores = before.languages[language]
        assert after.languages[language].tokens == scores.tokens
        for i, sentence in enumerate(sentences):
            ids = pair.tokenizer.encode(sentence, add_special_tokens=False)
            assert scores.tokens[i] == scores.bytes_[i] == len(sentence.encode()) - 1
            assert scores.nll_nats[i] == pytest.approx(naive_windows(llama.model, ids, context, []), rel=RELATIVE)


def test_a_first_token_of_several_bytes_is_left_out_whole(llama: Loaded) -> None:
    words = Tokenizer(models.WordLevel({"שלום": 1, "the": 2, "fox": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = llama._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    scores = score(pair, make_texts({"en": ["the fox"], "he": ["שלום fox"]}))[0]
    assert scores.languages["en"].bytes_ == (len(" fox"),)
    assert scores.languages["he"].bytes_ == (len(" fox"),)
    assert scores.languages["he"].tokens == (1,)


def test_a_first_token_of_byte_fallback_is_one_byte(llama: Loaded) -> None:
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"a": 256, "?": 257}
    pieces = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="?"))
    pair = llama._replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=pieces))
    scores = score(pair, make_texts({"zh": ["狐a", "aa狐"]}))[0].languages["zh"]
    assert scores.bytes_ == scores.tokens == (3, 4)


def test_the_beginning_is_what_the_texts_ask_for(llama: Loaded) -> None:
    texts = make_texts({"en": ["fox and dog", "dog"]})
    usual, eos, plain = (score(llama, replace(texts, start=start)) for start in ("auto", "eos", "plain"))
    assert usual == eos != plain
    assert [a - b for a, b in zip(eos[0].languages["en"].tokens, plain[0].languages["en"].tokens, strict=True)] == [
        1,
        1,
    ]


def test_a_sentence_of_one_token_without_bos_is_an_error(llama: Loaded) -> None:
    texts = make_texts({"en": ["fox", "a"]})
    with pytest.raises(ConfigError, match=r"en sentence 's1' has 1 token\(s\), none of which can be scored"):
        score(llama._replace(tokenizer=plain_tokenizer()), texts)


def test_an_empty_sentence_is_an_error(llama: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"he sentence 's0' has 0 token\(s\)"):
        score(llama, make_texts({"he": ["", "שועל"]}))


def test_without_bos_eos_and_offsets_the_tokenizer_is_refused(llama: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UnsupportedModelError, match="nothing stands before a text and the tokenizer gives no"):
        score(llama._replace(tokenizer=plain_tokenizer()))


def test_unknown_tokens_are_warned_of(llama: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    letters = {symbol: i + 1 for i, symbol in enumerate("abcdefghijklmnopqrstuvwxyzĠ")} | {"?": 0}
    pair = llama._replace(tokenizer=plain_tokenizer(letters, unknown="?"))
    with caplog.at_level(logging.WARNING):
        score(pair, make_texts({"en": ["fox and dog"], "he": ["שועל"]}))
    assert [record.getMessage() for record in caplog.records] == [
        "he: 100.0 % of the tokens are unknown to the tokenizer; its scores mean little"
    ]


def test_each_state_is_applied_around_its_own_passes_and_left(llama: Loaded) -> None:
    applied: list[str] = []

    def state(name: str, model: PreTrainedModel) -> ModelState:
        @contextmanager
        def enter() -> Iterator[PreTrainedModel]:
            assert "+" not in "".join(applied[-1:])  # no other state is active
            applied.append(f"+{name}")
            yield model
            applied.append(f"-{name}")

        return ModelState(name, enter)

    score_states([state("16 bit", llama.model), state("none", llama.other)], llama.tokenizer, TEXTS, batch_tokens=200)
    batches = applied[6:]  # before them, the tokens and each state's head are looked at
    assert applied[:6] == ["+16 bit", "-16 bit"] * 2 + ["+none", "-none"]
    assert batches == ["+16 bit", "-16 bit", "+none", "-none"] * (len(batches) // 4)
    assert len(batches) // 4 > 1


def test_progress_counts_every_batch_of_every_state(llama: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    states = [fixed_state("16 bit", llama.model), fixed_state("none", llama.other)]
    score_states(states, llama.tokenizer, TEXTS, batch_tokens=100, progress=lambda *step: seen.append(step))
    total = seen[-1][1]
    assert total > 2
    assert seen == [(i + 1, total) for i in range(total)]


def test_scores_have_seven_digits_and_are_reproduced(llama: Loaded) -> None:
    before, after = score(llama)
    assert (before, after) == score(llama)
    for scores in after.languages.values():
        for value in (*scores.nll_nats, *scores.kl_nats):
            assert value == float(f"{value:.7g}")
            assert math.isfinite(value)
            assert value >= 0


@pytest.mark.parametrize("broken", ["16 bit", "none"])
def test_a_state_that_predicts_nan_is_an_error(llama: Loaded, broken: str) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    pair = llama._replace(model=model) if broken == "16 bit" else llama._replace(other=model)
    with pytest.raises(ArtifactError, match=f"state '{broken}' predicts NaN or infinity on"):
        score(pair)


def test_states_of_different_vocabularies_are_not_compared(llama: Loaded) -> None:
    config = tiny_config("llama", layers=2, width=32)
    config.vocab_size = 300
    other = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="'none' has 300 logits and '16 bit' 264"):
        score(llama._replace(other=other))


def test_a_model_in_training_mode_is_refused(llama: Loaded) -> None:
    with pytest.raises(ConfigError, match="'none' is in training mode"):
        score(llama._replace(other=copy.deepcopy(llama.other).train()))


@pytest.mark.parametrize(
    ("limits", "message"), [({"batch_tokens": 0}, "batch_tokens=0"), ({"context": 3}, "context=3.*at least 4")]
)
def test_limits_that_are_too_small_are_errors(llama: Loaded, limits: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(llama, **limits)


@pytest.mark.parametrize("names", [[], ["none", "none"]])
def test_states_need_names_of_their_own(llama: Loaded, names: list[str]) -> None:
    with pytest.raises(ConfigError, match="no two of one name"):
        score_states([fixed_state(name, llama.model) for name in names], llama.tokenizer, TEXTS)
