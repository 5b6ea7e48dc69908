from __future__ import annotations

import random
from collections import Counter

import pytest

from quant_fairness_plugin.texts.parts import split_parts

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
