"""The peers' table says of every checkpoint what its row says, and a tool that lost to nobody is not made to."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from tests.test_pages import ROOT


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers_table

    return peers_table


def row(variant: str, kl: float, beyond: float, **more: Any) -> dict[str, Any]:
    def around(value: float) -> dict[str, float]:
        return {"estimate": value, "low": value - 0.01, "high": value + 0.01}

    languages = ("en", "fr", "es", "de", "ru", "zh", "ar")
    return {
        "variant": variant, "model": "demo", "tool": "gptqmodel", "calibration": "7 languages",
        "request": {"tokens": 3584}, "weight_bytes": 112_760_688, "worst_kl": around(kl), "mean_kl": around(kl / 2),
        "beyond_ours": {"worst": around(beyond), "mean": around(beyond / 2)},
        "kl": {name: around(kl) for name in languages}, "cpu_seconds": 188.4, "wall_seconds": 201.0,
        "peak_rss_bytes": 2_240_000_000, "made_at": "abc1234", "revision": "abc1234",
        "tool_versions": {"gptqmodel": "7.6.0", "torch": "2.13.0"},
    } | more  # fmt: skip


def test_a_peer_that_is_better_is_shown_as_better(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(peers.OURS, 0.424, 0.0), row("gptqmodel", 0.354, -0.07), row("AutoRound", 0, 0, failed="status 1")]
    monkeypatch.setattr(peers, "read_rows", lambda: rows)
    tables = peers.tables()
    assert tables.keys() == {"demo", "demo-languages", "demo-cost"}
    ours, peer = tables["demo"].splitlines()[2:]
    assert ours == "| quant-fairness, INT4 | 7 languages, 3584 tokens | 112.8 | 424 [414, 434] | 212 [202, 222] |  |  |"
    assert peer.endswith("| 354 [344, 364] | 177 [167, 187] | -70 [-80, -60] | -35 [-45, -25] |")
    assert tables["demo-languages"].splitlines()[-1] == "| gptqmodel | 7 languages |" + " 354 |" * 7
    assert "| 188 | 201 | 2.24 GB | gptqmodel 7.6.0, torch 2.13.0 | abc1234, measured abc1234 |" in tables["demo-cost"]


def test_every_variant_has_a_script_and_a_folder_of_its_own(peers: ModuleType) -> None:
    for variant in peers.VARIANTS.values():
        assert (ROOT / "benchmarks" / "peers" / f"{variant.tool}_quantize.py").is_file()
    assert len({peers.slug(name) for name in peers.VARIANTS}) == len(peers.VARIANTS)


def test_english_alone_is_calibrated_on_what_nothing_is_measured_on(peers: ModuleType) -> None:
    seven, english = (peers.calibration_texts(name) for name in ("7 languages", "English"))
    assert english.part("confirm").ids == seven.part("confirm").ids
    assert set(english.part("calibrate").ids) == set(seven.part("calibrate").ids) | set(seven.part("search").ids)
