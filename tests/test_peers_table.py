"""The peers' table says of every checkpoint what its row says, and a tool that lost to nobody is not made to."""

from __future__ import annotations

import json
import math
from pathlib import Path
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

    damage = {
        "worst_kl": around(kl), "mean_kl": around(kl / 2),
        "beyond_ours": {"worst": around(beyond), "mean": around(beyond / 2)},
    }  # fmt: skip
    languages = ("en", "fr", "es", "de", "ru", "zh", "ar")
    return {
        "variant": variant, "model": "demo", "tool": "gptqmodel", "calibration": "7 languages",
        "request": {"tokens": 3584}, "weight_bytes": 112_760_688, "beginnings": {"bos": damage},
        "sentences": 20,
        "kl": {name: around(kl) for name in languages}, "cpu_seconds": 188.4, "wall_seconds": 201.0,
        "peak_rss_bytes": 2_240_000_000, "made_at": "abc1234", "revision": "abc1234",
        "tool_versions": {"gptqmodel": "7.6.0", "torch": "2.13.0"},
    } | damage | more  # fmt: skip


def scored(given: dict[str, Any], nats: float) -> dict[str, Any]:
    """A row with the KL of every sentence; all lose the same."""
    sentences = {"kl_nats": [nats] * 20, "bytes": [10] * 20}
    more = {
        "kl": {name: value | {"status": "supported"} for name, value in given["kl"].items()},
        "by_sentence": dict.fromkeys(given["kl"], sentences), "sentences": 20,
    }  # fmt: skip
    return given | more | {"beginnings": {"bos": given["beginnings"]["bos"] | more}}


def test_a_peer_that_is_better_is_shown_as_better(peers: ModuleType) -> None:
    rows = [row(peers.OURS, 0.424, 0.0), row("gptqmodel", 0.354, -0.07), row("AutoRound", 0, 0, failed="status 1")]
    tables = peers.tables(rows, ["gptqmodel", "AutoRound", "llama.cpp"])
    assert tables.keys() == {"demo", "demo-languages", "demo-beginnings", "demo-cost"}
    ours, peer = tables["demo"].splitlines()[2:4]
    assert tables["demo"].endswith(
        "\n\nOn 20 sentences of each language.\n\nNot measured yet, or failed: AutoRound; llama.cpp.\n"
    )
    assert ours == "| quant-fairness, INT4 | 7 languages, 3584 tokens | 112.8 | 424 [414, 434] | 212 [202, 222] |  |  |"
    assert peer.endswith("| 354 [344, 364] | 177 [167, 187] | -70 [-80, -60] | -35 [-45, -25] |")
    assert tables["demo-languages"].splitlines()[-1] == "| gptqmodel | 7 languages |" + " 354 |" * 7
    assert tables["demo-beginnings"].splitlines()[2:] == [
        "| quant-fairness, INT4 | 7 languages | 424 [414, 434] | 424 [414, 434] |",
        "| gptqmodel | 7 languages |" + " 354 [344, 364]; -70 [-80, -60] |" * 2,
    ]
    assert "| 188 | 201 | 2.24 GB | gptqmodel 7.6.0, torch 2.13.0 | abc1234, measured abc1234 |" in tables["demo-cost"]


def test_small_losses_have_a_decimal(peers: ModuleType) -> None:
    tables = peers.tables([row(peers.OURS, 0.0049, 0.0), row("gptqmodel", 0.0052, 0.0003)])
    assert (
        tables["demo"]
        .splitlines()[3]
        .endswith("| 5.2 [-4.8, 15.2] | 2.6 [-7.4, 12.6] | +0.3 [-9.7, +10.3] | +0.1 [-9.8, +10.2] |")
    )
    assert tables["demo-languages"].splitlines()[-1] == "| gptqmodel | 7 languages |" + " 5.2 |" * 7
    assert "5.2 [-4.8, 15.2]; +0.3 [-9.7, +10.3] |" in tables["demo-beginnings"]


def test_a_row_without_sentences_is_not_compared_with_ours_anew(peers: ModuleType) -> None:
    ours, old = scored(row(peers.OURS, 0.4, 0.0), 4.0), row("gptqmodel", 0.3, -0.1)
    peers.compare(ours, old)
    assert "beyond_ours" not in old
    assert peers.tables([ours, old])["demo"].splitlines()[3].endswith("| 300 [290, 310] | 150 [140, 160] | – | – |")


def test_every_variant_has_a_script_and_a_folder_of_its_own(peers: ModuleType) -> None:
    for variant in peers.VARIANTS.values():
        assert (ROOT / "benchmarks" / "peers" / f"{variant.tool}_quantize.py").is_file()
    assert len({peers.slug(name) for name in peers.VARIANTS}) == len(peers.VARIANTS)


def test_a_model_without_a_gguf_file_has_no_variants_of_gguf(peers: ModuleType) -> None:
    left_out = set(peers.VARIANTS) - set(peers.possible("demo"))
    assert left_out == {name for name in peers.VARIANTS if "GGUF" in name or "llama.cpp" in name}
    assert peers.possible("SmolLM2-135M") == list(peers.VARIANTS)


def test_the_bytes_that_another_tool_gets_are_those_made_here_before_those_of_the_row(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "ROWS", tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit, match="make it first"):
        peers.bytes_of("demo", tmp_path, peers.OURS)
    peers.ROWS.write_text(json.dumps(row(peers.OURS, 0.4, 0.0, weight_bytes=300)) + "\n", encoding="utf-8")
    assert peers.bytes_of("demo", tmp_path, peers.OURS) == 300
    peers.note(tmp_path, peers.OURS).write_text('{"weight_bytes": 200}', encoding="utf-8")
    assert peers.bytes_of("demo", tmp_path, peers.OURS) == 200


def test_english_alone_is_calibrated_on_what_nothing_is_measured_on(peers: ModuleType) -> None:
    seven, english = (peers.calibration_texts(name) for name in ("7 languages", "English"))
    assert english.part("confirm").ids == seven.part("confirm").ids
    assert set(english.part("calibrate").ids) == set(seven.part("calibrate").ids) | set(seven.part("search").ids)


def test_the_readmes_table_has_a_line_for_each_tool_with_its_english_figure(peers: ModuleType) -> None:
    rows = [row(peers.OURS, 0.424, 0.0), row("gptqmodel", 0.354, -0.07), row("AutoRound", 0, 0, failed="status 1")]
    without = peers.front(rows)["peers"].splitlines()
    assert without[0] == "| checkpoint | MB | worst language | mean | CPU s | most memory |"
    assert without[2] == "| quant-fairness, INT4 | 112.8 | 424 [414, 434] | 212 [202, 222] | 188 | 2.2 GB |"
    rows.append(row("gptqmodel, English", 0.7, 0.3, calibration="English"))
    head, rule, ours, peer = peers.front(rows)["peers"].splitlines()
    assert head.endswith("| worst, calibrated in English |")
    assert rule.count("|") == head.count("|")
    assert ours == f"{without[2]}  |"
    assert peer == "| gptqmodel | 112.8 | 354 [344, 364] | 177 [167, 187] | 188 | 2.2 GB | 700 [690, 710] |"


def test_sentences_behind_other_beginnings_are_of_the_confirm_part_alone(peers: ModuleType) -> None:
    texts = peers.calibration_texts("7 languages")
    few = peers.some(texts, 20)
    assert len(set(few.ids)) == 20
    assert set(few.ids) < set(texts.part("confirm").ids)


def test_rows_of_variants_that_are_not_measured_again_stay(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept, old = scored(row("gptqmodel", 0.4, 0.1), 2.0), scored(row(peers.OURS, 0.9, 0.0), 9.0)
    monkeypatch.setattr(peers, "ROWS", tmp_path / "rows.jsonl")
    peers.ROWS.write_text("".join(json.dumps(each) + "\n" for each in (old, kept)), encoding="utf-8")

    def damage(model: str, work: Path, names: list[str], sentences: int) -> dict[str, dict[str, Any]]:
        return {name: scored(row(name, 0.5, 0.0), 1.0) | {"sentences": sentences} for name in names}

    monkeypatch.setattr(peers, "damage", damage)
    peers.note(tmp_path, peers.OURS).write_text("{}", encoding="utf-8")
    peers.measure("demo", "demo", tmp_path, [peers.OURS, "AutoRound, 20 iterations"], sentences=20)
    ours, other = peers.read_rows()
    assert (ours["variant"], ours["worst_kl"]["estimate"]) == (peers.OURS, 0.5)
    # 20 sentences of 10 bytes that lose 2 nats each in the worst language and mean, beside 1 nat: in bits per byte.
    assert other["beyond_ours"]["worst"]["estimate"] == pytest.approx(0.1 / math.log(2))
    assert other["beginnings"]["bos"]["beyond_ours"]["mean"]["estimate"] == pytest.approx(0.1 / math.log(2))
    compared = ("beyond_ours", "beginnings")
    assert {key: other[key] for key in other if key not in compared} == {
        key: kept[key] for key in kept if key not in compared
    }
    with pytest.raises(SystemExit, match="number of sentences"):
        peers.measure("demo", "demo", tmp_path, [peers.OURS], sentences=10)
    assert peers.read_rows() == [ours, other]
