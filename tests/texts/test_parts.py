from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.texts.load import load_texts
from quant_fairness_plugin.texts.parts import overlap, split_parts, true_part, used_before

SHARES = {"calibrate": 40 / 180, "search": 70 / 180, "confirm": 70 / 180}


def test_two_equal_registers_of_180_are_split_exactly() -> None:
    registers = ["narrative"] * 90 + ["everyday"] * 90
    counts = Counter(zip(registers, split_parts(180, registers, 0), strict=True))
    for register in ("narrative", "everyday"):
        assert counts[register, "calibrate"] == 20
        assert counts[register, "search"] == 35
        assert counts[register, "confirm"] == 35


@pytest.mark.parametrize("n", [20, 21, 33, 63, 129, 1000])
@pytest.mark.parametrize("seed", [0, 1, 17])
def test_every_part_and_every_register_is_within_two_of_its_share(n: int, seed: int) -> None:
    draw = random.Random(n)
    registers = [draw.choice("aabc") for _ in range(n)]
    parts = split_parts(n, registers, seed)
    assert len(parts) == n
    for part, share in SHARES.items():
        assert abs(parts.count(part) - share * n) < 1
        for register in "abc":
            found = sum(p == part for p, r in zip(parts, registers, strict=True) if r == register)
            assert abs(found - share * registers.count(register)) < 2


@pytest.mark.parametrize("n", [0, 1, 17, 19])
def test_fewer_than_twenty_sentences_are_not_split(n: int) -> None:
    assert split_parts(n, [""] * n, 0) == ("all",) * n


def test_the_seed_and_nothing_else_decides() -> None:
    registers = [""] * 63
    assert split_parts(63, registers, 5) == split_parts(63, registers, 5)
    assert split_parts(63, registers, 5) != split_parts(63, registers, 6)


def test_a_split_never_changes_between_versions() -> None:
    initials = "".join(part[1] for part in split_parts(20, [""] * 20, 0))
    assert initials == "ooeeeeeaaoeooeaeaooo"


def test_neighbours_are_dealt_out_to_all_parts() -> None:
    parts = split_parts(180, [""] * 180, 0)
    assert all(set(parts[start : start + 45]) == set(SHARES) for start in range(0, 180, 45))


def test_registers_that_do_not_fit_the_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 registers for 3 sentences"):
        split_parts(3, ["a", "b"], 0)


def short_set(sentences: int, parts: tuple[str, ...] | None = None, repeated: int | None = None) -> TextSet:
    """English and Hebrew sentences; the first one again at `repeated`."""
    whole = load_texts("bundled", languages=["en", "he"])
    short = whole.take(range(sentences))
    rows = dict(short.sentences)
    if repeated is not None:
        rows["he"] = tuple(rows["he"][0] if i == repeated else text for i, text in enumerate(rows["he"]))
    return replace(short, name="t", sentences=rows, parts=parts or split_parts(sentences, [""] * sentences, 0))


def test_a_set_that_was_not_split_shares_all_its_sentences() -> None:
    texts = short_set(19)
    assert (texts.shared, true_part(texts, "confirm")) == (19, "all")
    assert "share the same sentences, 19 of 19" in overlap(texts)
    assert used_before(texts, "confirm") == overlap(texts)


def test_a_split_set_shares_nothing_and_its_other_parts_are_not_held_out() -> None:
    texts = short_set(20)
    assert (texts.shared, overlap(texts), true_part(texts, "confirm")) == (0, "", "confirm")
    assert used_before(texts, "confirm") == ""
    assert used_before(texts, "calibrate") == "calibration uses these sentences of t: not held out"
    assert used_before(texts, "search") == "plans are searched on these sentences of t: not held out"
    assert used_before(texts, "all") == "calibration uses some of these sentences of t: not held out"


def test_sentences_that_another_part_repeats_are_shared() -> None:
    parts = ("calibrate", "search", "confirm", "calibrate")
    assert short_set(4, parts).shared == 0
    assert short_set(4, parts, repeated=2).shared == 2  # the calibrated one and its repetition in confirm
    assert short_set(4, parts, repeated=3).shared == 0  # within a part
    assert short_set(4, ("calibrate", "all", "confirm", "all")).shared == 2
