from __future__ import annotations

from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import Documents, TextSet, sentence_digests
from quant_fairness_plugin.errors import ConfigError, UnknownLanguageError
from quant_fairness_plugin.quantize.calibration import build_calibration, coverage_lines
from tests.tiny import byte_tokenizer

EOS = 0


def decode(rows: tuple[tuple[int, ...], ...]) -> list[str]:
    """Sentences of rows, in order; rows that a sentence goes on in are joined."""
    text = byte_tokenizer().decode([token for row in rows for token in row if token != EOS])
    return str(text).split("\n")


@pytest.mark.parametrize("row_tokens", [2, 17, 24, 256])
def test_every_language_has_exactly_the_tokens_of_the_smallest(texts: TextSet, row_tokens: int) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, row_tokens=row_tokens)
    assert set(calibration.rows) == {"en", "he", "zh"}
    assert len(set(calibration.coverage.values())) == 1
    assert calibration.coverage["en"] == sum(len(row) for row in calibration.rows["en"])
    for rows in calibration.rows.values():
        assert all(len(row) == row_tokens for row in rows[:-1])
        assert 1 <= len(rows[-1]) <= row_tokens


def test_the_smallest_language_is_used_whole(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, starts=("plain",))
    sizes = {lang: 2 + sum(len(s.encode()) for s in rows[:3]) for lang, rows in texts.sentences.items()}
    assert calibration.coverage == dict.fromkeys(sizes, min(sizes.values()))
    smallest = min(sizes, key=lambda language: sizes[language])
    assert sorted(decode(calibration.rows[smallest])) == sorted(texts.sentences[smallest][:3])


def test_only_the_calibrate_part_is_read(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts)
    assert all("Search" not in piece for piece in decode(calibration.rows["en"]))
    whole = replace(texts, parts=("all",) * 4)
    coverage = build_calibration(byte_tokenizer(), whole).coverage["en"]
    assert coverage > calibration.coverage["en"]


def test_a_budget_is_met_exactly_and_sets_the_coverage(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, tokens_per_language=31, row_tokens=10)
    assert calibration.coverage == {"en": 31, "he": 31, "zh": 31}
    assert [len(row) for row in calibration.rows["he"]] == [10, 10, 10, 1]


def test_a_budget_that_a_language_cannot_meet_is_an_error(texts: TextSet) -> None:
    has = build_calibration(byte_tokenizer(), texts).coverage["en"]
    build_calibration(byte_tokenizer(), texts, tokens_per_language=has)
    with pytest.raises(ConfigError, match=f"has {has} calibration tokens, fewer than the {has + 1} of every.*at most"):
        build_calibration(byte_tokenizer(), texts, tokens_per_language=has + 1)


def test_the_same_seed_gives_the_same_rows_and_another_one_others(texts: TextSet) -> None:
    first, again = (build_calibration(byte_tokenizer(), texts, tokens_per_language=20, seed=1) for _ in range(2))
    assert first == again
    assert first.sha256 == again.sha256
    sums = {build_calibration(byte_tokenizer(), texts, tokens_per_language=20, seed=seed).sha256 for seed in range(9)}
    assert len(sums) == 3  # one for each sentence that comes first


def test_sentences_come_in_one_order_for_all_languages(texts: TextSet) -> None:
    english = texts.sentences["en"]
    doubled = replace(texts, sentences={"en": english, "xx": tuple(s.upper() for s in english)})
    orders = set()
    for seed in range(9):
        calibration = build_calibration(byte_tokenizer(), doubled, seed=seed, starts=("plain",))
        pieces = decode(calibration.rows["en"])
        assert [piece.upper() for piece in pieces] == decode(calibration.rows["xx"])
        orders.add(tuple(pieces))
    assert len(orders) > 1


def test_rows_begin_in_every_way_in_turn_and_languages_take_turns_at_the_first(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, row_tokens=10)
    assert calibration.starts == {"eos": (EOS,), "plain": ()}
    for number, rows in enumerate(calibration.rows.values()):
        assert len(rows) > 3
        assert [row[0] == EOS for row in rows] == [(place + number) % 2 == 0 for place in range(len(rows))]
        assert all(EOS not in row[1:] for row in rows)


def test_rows_of_one_beginning_can_be_asked_for(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, row_tokens=10, starts=("eos",))
    assert all(row[0] == EOS for rows in calibration.rows.values() for row in rows)
    assert calibration.summary()["starts"] == {"eos": [EOS]}


@pytest.mark.parametrize("row_tokens", [7, 24, 256])
def test_no_token_of_a_text_is_lost_between_rows(texts: TextSet, row_tokens: int) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, weighting="proportional", row_tokens=row_tokens)
    for language, rows in calibration.rows.items():
        text = "".join(decode(rows))
        assert sorted(text) == sorted("".join(texts.sentences[language][:3]))


def test_a_beginning_longer_than_half_a_row_is_left_out(texts: TextSet) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<|endoftext|>user: {{ messages[0]['content'] }}"
    assert "chat" in build_calibration(tokenizer, texts, row_tokens=16).starts
    assert "chat" not in build_calibration(tokenizer, texts, row_tokens=13).starts


def test_only_beginnings_of_a_row_are_named(texts: TextSet) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<|endoftext|>{{ messages[0]['role'] }}: {{ messages[0]['content'] }}"
    one = build_calibration(tokenizer, texts, languages=["en"], tokens_per_language=20)
    assert one.row_counts == {"en": 1}
    assert list(one.starts) == ["eos"]
    assert list(build_calibration(tokenizer, texts, tokens_per_language=20).starts) == ["eos", "plain", "chat"]
    chats = Documents(name="own", texts={"en": ((("user", "Hello?"),),)}, sha256="")
    written = build_calibration(tokenizer, chats)
    assert written.starts == {}
    assert not any("rows begin" in line for line in coverage_lines(written.summary()))


def test_the_digests_are_of_what_is_in_the_rows(texts: TextSet) -> None:
    whole = build_calibration(byte_tokenizer(), texts, weighting="proportional", row_tokens=10)
    assert whole.sentences == sentence_digests(text for rows in texts.sentences.values() for text in rows[:3])
    first = build_calibration(byte_tokenizer(), texts, languages=["en"], tokens_per_language=8, row_tokens=8)
    text = decode(first.rows["en"])[0]
    assert first.sentences == sentence_digests(row for row in texts.sentences["en"] if row.startswith(text))
    said = (("user", "Hello?"), ("assistant", "Yes."))
    chats = Documents(name="own", texts={"en": (said,)}, sha256="")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert build_calibration(tokenizer, chats).sentences == sentence_digests([said])


def test_languages_can_be_chosen(texts: TextSet) -> None:
    assert list(build_calibration(byte_tokenizer(), texts, languages=["zh", "en"]).rows) == ["zh", "en"]
    with pytest.raises(UnknownLanguageError, match="has no fr to calibrate on; it has en, he, zh"):
        build_calibration(byte_tokenizer(), texts, languages=["en", "fr"])
    with pytest.raises(ConfigError, match="in 0 languages"):
        build_calibration(byte_tokenizer(), texts, languages=[])


def test_a_part_without_sentences_is_an_error(texts: TextSet) -> None:
    with pytest.raises(ConfigError, match="small has no sentences to calibrate on"):
        build_calibration(byte_tokenizer(), replace(texts, parts=("search",) * 4))


def test_a_language_without_tokens_is_an_error(texts: TextSet) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    empty = replace(texts, sentences=texts.sentences | {"he": ("",) * 4})
    with pytest.raises(ConfigError, match="he has 0 calibration tokens"):
        build_calibration(tokenizer, empty)


def test_sizes_that_are_too_small_are_errors(texts: TextSet) -> None:
    with pytest.raises(ConfigError, match="1 tokens a row are too few"):
        build_calibration(byte_tokenizer(), texts, row_tokens=1)
    with pytest.raises(ConfigError, match="0 tokens per language are too few"):
        build_calibration(byte_tokenizer(), texts, tokens_per_language=0)


def test_the_summary_is_plain_data_without_the_text(texts: TextSet) -> None:
    summary = build_calibration(byte_tokenizer(), texts, tokens_per_language=20, seed=3).summary()
    assert summary["tokens_per_language"] == {"en": 20, "he": 20, "zh": 20}
    assert summary["rows_per_language"] == {"en": 1, "he": 1, "zh": 1}
    assert summary["weights"] == {"en": 1 / 3, "he": 1 / 3, "zh": 1 / 3}
    assert summary["weighting"] == "uniform"
    assert summary["source"] == "small"
    assert summary["seed"] == 3
    assert summary["starts"] == {"eos": [EOS], "plain": []}
    assert not any(isinstance(value, (list, tuple)) for value in summary.values())


def test_proportional_keeps_every_token_and_weighs_by_them(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, weighting="proportional", starts=("plain",))
    sizes = {lang: 2 + sum(len(s.encode()) for s in rows[:3]) for lang, rows in texts.sentences.items()}
    assert calibration.coverage == sizes
    for language in sizes:
        assert sorted(decode(calibration.rows[language])) == sorted(texts.sentences[language][:3])
    total = sum(calibration.coverage.values())
    assert calibration.shares == {lang: count / total for lang, count in calibration.coverage.items()}
    assert sum(calibration.shares.values()) == pytest.approx(1)
    assert len(set(calibration.coverage.values())) == 3


def test_proportional_takes_no_budget(texts: TextSet) -> None:
    with pytest.raises(ConfigError, match="20 tokens per language and 'proportional' weights exclude each other"):
        build_calibration(byte_tokenizer(), texts, weighting="proportional", tokens_per_language=20)


def test_english_is_calibrated_on_alone_with_all_its_tokens(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, weighting="english", starts=("plain",))
    assert calibration.coverage == {"en": 2 + sum(len(s.encode()) for s in texts.sentences["en"][:3])}
    assert calibration.shares == {"en": 1.0}
    capped = build_calibration(byte_tokenizer(), texts, weighting="english", tokens_per_language=20)
    assert capped.coverage == {"en": 20}


def test_a_variety_of_english_is_english(texts: TextSet) -> None:
    british = replace(texts, sentences={"he": texts.sentences["he"], "en-GB": texts.sentences["en"]})
    assert list(build_calibration(byte_tokenizer(), british, weighting="english").rows) == ["en-GB"]


def test_without_english_in_the_text_set_english_is_an_error(texts: TextSet) -> None:
    other = texts.choose(["he", "zh"])
    with pytest.raises(UnknownLanguageError, match="needs English, which is not among he, zh of small"):
        build_calibration(byte_tokenizer(), other, weighting="english")


def test_minimax_starts_with_the_rows_and_weights_of_uniform(texts: TextSet) -> None:
    minimax, uniform = (build_calibration(byte_tokenizer(), texts, weighting=name) for name in ("minimax", "uniform"))
    assert minimax.rows == uniform.rows
    assert minimax.shares == uniform.shares
    assert minimax.weighting == "minimax"


def test_the_coverage_is_one_line_for_languages_that_got_alike(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, tokens_per_language=31, row_tokens=10)
    lines = coverage_lines(calibration.summary())
    assert lines[0] == "calibration: small, sha256 000000000000, weights uniform"
    assert lines[1] == "  rows begin in turn: eos, plain"
    assert lines[2:] == ["  en, he, zh: each 4 rows, 31 tokens, weight 0.333"]
    weights, damage = {"en": 0.5, "he": 0.25, "zh": 0.25}, {"en": 0.2, "he": 0.1, "zh": 0.1}
    found = replace(calibration, weights=weights, weighting="minimax", nearest_kl=damage)
    lines = coverage_lines(found.summary())
    assert lines[0].endswith("weights minimax by what rounding to nearest costs each language")
    assert lines[2:] == [
        "  en: 4 rows, 31 tokens, weight 0.500",
        "  he, zh: each 4 rows, 31 tokens, weight 0.250",
    ]
    assert found.summary()["nearest_kl"] == damage
    assert coverage_lines({}) == ["not calibrated"]


def test_own_documents_need_not_be_parallel(texts: TextSet) -> None:
    documents = Documents(name="own", texts={"en": ("One.", "Two.", "Three."), "he": ("שלום",)}, sha256="1" * 64)
    calibration = build_calibration(byte_tokenizer(), documents, starts=("plain",))
    assert calibration.coverage == {"en": 8, "he": 8}
    assert (calibration.source, calibration.text_sha256) == ("own", "1" * 64)
    whole = build_calibration(byte_tokenizer(), documents, weighting="proportional", starts=("plain",))
    assert sorted(decode(whole.rows["en"])) == ["One.", "Three.", "Two."]
    first, other = (build_calibration(byte_tokenizer(), given).rows for given in (Documents.of(texts), texts))
    assert first == other


def test_conversations_have_rows_of_their_own_that_begin_as_the_template_says() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    chat = (("user", "Hello?"), ("assistant", "Yes."))
    documents = Documents(name="own", texts={"en": ("One.", chat, "Two.")}, sha256="")
    for seed in range(5):
        rows = build_calibration(tokenizer, documents, row_tokens=16, starts=("plain",), seed=seed).rows["en"]
        written = tokenizer("<|endoftext|>user: Hello?<|endoftext|>assistant: Yes.")["input_ids"]
        assert {tuple(written[:16]), tuple(written[16:])} < set(rows)
        others = tuple(row for row in rows if row not in (tuple(written[:16]), tuple(written[16:])))
        assert sorted(decode(others)) == ["One.", "Two."]


def test_a_conversation_that_the_template_refuses_is_an_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    documents = Documents(name="own", texts={"en": ((("user", "a"), ("user", "b")),)}, sha256="")
    with pytest.raises(ConfigError, match=r"a conversation of user, user .*roles must alternate"):
        build_calibration(tokenizer, documents)


def test_tokens_that_tell_as_much_as_those_of_uneven_weights(texts: TextSet) -> None:
    calibration = build_calibration(byte_tokenizer(), texts, tokens_per_language=31, row_tokens=10)
    assert calibration.telling_tokens == pytest.approx(93)
    one = replace(calibration, weights={"en": 1.0, "he": 0.0, "zh": 0.0})
    assert one.telling_tokens == pytest.approx(31)
    uneven = replace(calibration, weights={"en": 0.5, "he": 0.25, "zh": 0.25})
    # The variance of a weighted mean over all tokens, each as uncertain as any other, is Σ w² of them.
    variance = sum((uneven.shares[language] / 31) ** 2 for language in uneven.rows for _ in range(31))
    assert uneven.telling_tokens == pytest.approx(1 / variance)


def test_documents_say_how_many_tokens_are_enough() -> None:
    texts = Documents(name="many", texts={"en": ("a" * 900,), "de": ("b" * 700,)}, sha256="")
    tokens = {
        (enough, wanted): build_calibration(
            byte_tokenizer(), replace(texts, enough=enough), tokens_per_language=wanted, row_tokens=64
        ).coverage
        for enough in (None, 300, 5000)
        for wanted in (None, 500)
    }
    assert tokens[300, None] == {"en": 300, "de": 300}
    assert tokens[5000, None] == tokens[None, None]
    assert tokens[300, 500] == tokens[None, 500] == {"en": 500, "de": 500}
    shares = build_calibration(byte_tokenizer(), replace(texts, enough=300), row_tokens=64, weighting="proportional")
    assert shares.coverage["en"] > shares.coverage["de"] > 700
