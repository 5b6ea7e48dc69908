"""The planted model does what it says, for other draws too, and without the plant it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Bootstrap, Grid, SweepReport
from quant_fairness_plugin.measure.guards import byte_unigram_bpb
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from tests.planted_model import LAYERS, PLANTED_LAYER, SHRINK, planted_texts, planted_weights, write_planted_model

OTHERS = [layer for layer in range(LAYERS) if layer != PLANTED_LAYER]


def swept(folder: Path) -> SweepReport:
    texts = planted_texts().part("search")
    config, bootstrap = SweepConfig(modes=("quantize-one",), top=1), Bootstrap(draws=200)
    return sweep_units(load_model(str(folder)), texts, config, grid=Grid(group_size=32), bootstrap=bootstrap)


def damage(report: SweepReport, layer: int) -> dict[str, float]:
    row = next(row for row in report.rows if row.plan == f"quantize {layer}")
    return {found.language: found.kl_bits_per_byte.estimate for found in row.damage}


@pytest.mark.parametrize("seed", [1, 2])
def test_the_effect_is_in_how_it_is_built_and_not_in_the_draw(seed: int, tmp_path: Path) -> None:
    write_planted_model(tmp_path, seed=seed)
    report, texts = swept(tmp_path), planted_texts().part("search")
    planted = damage(report, PLANTED_LAYER)
    # 6.3 and 5.2 times, 9.6 and 15.8 times; 0.5 bits and more.
    assert planted["he"] > 3 * planted["en"]
    assert planted["he"] > 4 * max(max(damage(report, layer).values()) for layer in OTHERS)
    for language, scores in report.scores["16 bit"].languages.items():
        bits = sum(scores.nll_nats) / sum(scores.bytes_) / torch.log(torch.tensor(2.0))
        assert bits < byte_unigram_bpb(texts.sentences[language]) - 0.25


def test_without_hidden_channels_the_planted_layer_is_one_of_many(tmp_path: Path) -> None:
    write_planted_model(tmp_path, shrink=1.0)
    report = swept(tmp_path)
    planted = damage(report, PLANTED_LAYER)
    assert planted["he"] < 2 * planted["en"]
    assert planted["he"] < 2 * max(damage(report, layer)["he"] for layer in OTHERS)


def test_hiding_channels_changes_nothing_in_16_bit() -> None:
    """But where a float16 has no smaller steps left, which are of 2⁻²⁴."""
    hidden, plain = planted_weights(0, SHRINK), planted_weights(0, 1.0)
    up, down = (f"model.layers.{PLANTED_LAYER}.mlp.{name}_proj.weight" for name in ("up", "down"))
    assert {name for name in plain if (hidden[name] != plain[name]).any()} == {up, down}
    factor = hidden[up][:, 0] / plain[up][:, 0]
    assert set(factor) == {1.0, SHRINK}
    stored = {name: torch.from_numpy(values[down]).half().double() for name, values in
              (("hidden", hidden), ("plain", plain))}  # fmt: skip
    restored = stored["hidden"] * torch.from_numpy(factor)
    torch.testing.assert_close(restored, stored["plain"], rtol=0, atol=SHRINK * 2**-25)
