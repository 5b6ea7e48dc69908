"""The table of three ways to make a model smaller says what its rows say, and no more than their intervals allow."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from quant_fairness_plugin.measure.damage import measure_damage
from tests.planted import BOOTSTRAP, SENTENCES, VOCABULARY, planted_texts, state
from tests.test_pages import ROOT

NOTHING = {"en": 0.0, "he": 0.0, "zh": 0.0}


@pytest.fixture
def trifecta(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trifecta_table

    return trifecta_table


def around(value: float, reach: float = 0.01) -> dict[str, float]:
    return {"estimate": value, "low": value - reach, "high": value + reach}


def row(name: str, ratio: dict[str, float], **more: Any) -> dict[str, Any]:
    language = {"kl": around(0.0314), "delta_bpb": around(0.0276), "status": "supported"}
    collapsed = language | {"status": "collapsed"}
    return {
        "state": name, "kind": "pruned", "bytes": 4_000_000, "sixteen_bit_bytes": 16_000_000,
        "worst_kl": around(0.419), "mean_kl": around(0.2), "share_rho": {"undefined": "one does not vary"},
        "low_over_high": {"kl": ratio, "bpb": around(1.0), "sentence": ratio},
        "languages": {"en": language, "he": collapsed}, "shares": {"en": 1.0, "he": 0.1},
    } | more  # fmt: skip


def test_a_line_for_each_state_and_a_verdict_by_intervals(
    trifecta: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught = {"layers": 6, "teacher": {"layers": 12}, "steps": 1500, "tokens": 250, "teacher_tokens": 1000}
    last = row(trifecta.STUDENT, around(1.5), kind="distilled", trained=taught | {"seconds": 1800})
    monkeypatch.setattr(
        trifecta, "read_rows", lambda: [row("INT4", around(0.6)), row("half", around(1.0), format=None), last]
    )
    tables = trifecta.tables()
    lines = tables["trifecta"].splitlines()
    cells = "4.0 MB, 25% | 419 [409, 429] | 200 [190, 210] | 0.60 [0.59, 0.61] | 1.00 [0.99, 1.01]"
    assert lines[2] == f"| INT4 | {cells} | 0.60 [0.59, 0.61] | undefined |"
    assert "4.0 MB, 25%, not written |" in lines[3]
    assert lines[6].startswith("| by | low-resource languages lose more |")
    assert lines[8] == f"| KL a byte | {trifecta.STUDENT} | INT4 | half |"
    assert lines[9] == f"| bits per byte | none | none | INT4; half; {trifecta.STUDENT} |"
    assert "6 of 12 layers and was trained for 1,500 steps on 250 tokens, 25% of the 1,000" in " ".join(lines[12:])
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))
    assert tables["trifecta-languages"].splitlines()[2:] == [
        "| en | 100% |" + " 31.4, 27.6 |" * 3,
        "| he | 10% |" + " 31.4, 27.6 (collapsed) |" * 3,
    ]


def test_ratios_are_paired_over_the_sentences(trifecta: ModuleType) -> None:
    before, after = state("16 bit", NOTHING), state("smaller", {"en": 1.0, "he": 2.0, "zh": 4.0})
    damage = measure_damage(before, after, planted_texts(), vocabulary=VOCABULARY, bootstrap=BOOTSTRAP)
    assert damage[0].sentences == SENTENCES
    found = trifecta.ratios(before, after, damage, BOOTSTRAP)
    assert found.keys() == trifecta.RATIOS.keys()
    for value in found.values():
        assert value["low"] < value["estimate"] < value["high"]
        assert value["estimate"] == pytest.approx(3.0, rel=0.1)
    rho = trifecta.share_rho(damage, {"en": 1.0, "he": 0.1, "zh": 0.05})
    assert "at least 4" in rho.undefined


def test_the_undefined_is_said(trifecta: ModuleType) -> None:
    assert trifecta.shown({"undefined": "nothing lost"}) == "undefined"
    assert trifecta.verdict([{"state": "a", "low_over_high": {"kl": {"undefined": "no"}}}], "kl") == [
        "none",
        "none",
        "a",
    ]
