"""Statistics of weights against numpy and scipy on the same tensors; planted outliers; scores against a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from quant_fairness_plugin.analysis.distributions import describe, magnitude_histogram
from quant_fairness_plugin.analysis.kinds import find_analysis
from quant_fairness_plugin.analysis.predictors import compare_scores
from quant_fairness_plugin.analysis.request import AnalysisOptions, Request
from quant_fairness_plugin.analysis.weights import WeightStatistics, kind_shares, norm_placement
from quant_fairness_plugin.artifacts import Interval, Undefined, save
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence.weight_statistics import criticality, layer_statistics
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256, resolve_model
from tests.planted import planted_report, planted_texts


def ask(folder: Path, *sweeps: Path) -> WeightStatistics:
    def refuse() -> None:
        raise AssertionError("a model was loaded")

    request = Request(
        files=resolve_model(str(folder)),
        texts=planted_texts(),
        config=FairConfig(),
        options=AnalysisOptions(sweep=sweeps or None),
        load=refuse,  # type: ignore[arg-type]
    )
    result = find_analysis("weights").run(request)
    assert isinstance(result, WeightStatistics)
    return result


def test_a_tensor_is_described_as_scipy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.analysis.distributions.CHUNK", 100)
    values = torch.randn(37, 11, generator=torch.Generator().manual_seed(3)).mul(0.05).add(0.01).half()
    values[5, 3] = 1.5
    flat = values.double().numpy().ravel()
    found = describe("w", "qkv", 2, values)
    away = np.abs(flat - flat.mean()) / flat.std()
    assert found.variance == pytest.approx(flat.var())
    assert found.kurtosis == pytest.approx(stats.kurtosis(flat))
    assert found.magnitude == pytest.approx(np.abs(flat).mean())
    assert [found.beyond_2_5_sigma, found.beyond_3_sigma, found.beyond_6_sigma] == [
        (away > times).mean() for times in (2.5, 3, 6)
    ]
    assert found.beyond_6_sigma == 1 / 407  # the planted one
    assert found.near_zero == (np.abs(flat) < 0.01).mean()
    assert found.max_over_sigma == pytest.approx(1.5 / flat.std())
    assert isinstance(describe("w", "norms", 0, torch.ones(9)).kurtosis, Undefined)
    with pytest.raises(ConfigError, match="w: its variance is nan"):
        describe("w", "qkv", 0, torch.tensor([1.0, float("nan")]))


def test_the_largest_weights_are_counted_as_by_sorting() -> None:
    draw = torch.Generator().manual_seed(1)
    tensors = {
        "qkv": torch.randn(900, generator=draw).half(),
        "embeddings": torch.randn(300, generator=draw).half() * 3,
    }
    shares = {row.kind: row for row in kind_shares({name: magnitude_histogram(v) for name, v in tensors.items()})}
    values = np.concatenate([tensor.abs().numpy() for tensor in tensors.values()])
    limit = np.sort(values)[::-1][len(values) // 100 - 1]
    counts = {name: int((tensor.abs().numpy() >= limit).sum()) for name, tensor in tensors.items()}
    assert list(shares) == ["qkv", "embeddings"]
    assert shares["qkv"].share == 0.75
    assert shares["embeddings"].share_of_largest == pytest.approx(counts["embeddings"] / sum(counts.values()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_layers_and_criticality_are_those_of_the_loaded_model(tiny_model: Callable[..., Path], family: str) -> None:
    folder = tiny_model(family, layers=3)
    found, loaded = ask(folder), load_model(str(folder))
    naive = [layer_statistics(linear_weight(m) for m in loaded.linears(layer).values()) for layer in range(3)]
    assert [row.kurtosis for row in found.layers] == pytest.approx([row.kurtosis for row in naive])
    expected = criticality(naive)
    if isinstance(expected, Undefined):
        assert all(isinstance(row.criticality, Undefined) for row in found.layers)
    else:
        assert [row.criticality for row in found.layers] == pytest.approx(list(expected))
    parameters = dict(loaded.model.named_parameters())
    assert sum(row.weights for row in found.tensors) == sum(value.numel() for value in parameters.values())
    assert found.norms == "before"
    assert found.scores == ()


def test_where_norms_stand_is_never_guessed() -> None:
    def files(**config: object) -> ModelFiles:
        return ModelFiles("m", Path("m"), config, (), 2, None)

    assert norm_placement(files(model_type="opt", do_layer_norm_before=False)) == "after"
    assert isinstance(norm_placement(files(model_type="strange")), Undefined)


def test_a_score_that_is_the_benefit_agrees_and_a_reversed_one_does_not(tiny_model: Callable[..., Path]) -> None:
    files = resolve_model(str(tiny_model("llama", layers=5)))
    benefit = [2.0, 4.5, 0.5, 3.5, 1.0]  # less than what any language loses
    report = planted_report(benefit, noise=0.01)
    report = replace(report, provenance=replace(report.provenance, model_sha256=model_sha256(files)))
    good, bad = compare_scores({"same": benefit, "reversed": [-b for b in benefit]}, report, files, draws=200)
    assert isinstance(good.rho, Interval)
    assert isinstance(bad.rho, Interval)
    assert isinstance(good.r_squared, Interval)
    assert (good.rho.estimate, bad.rho.estimate) == (1.0, -1.0)
    assert good.r_squared.estimate > 0.99
    flat = compare_scores({"flat": [1.0] * 5}, report, files, draws=200)[0]
    assert isinstance(flat.rho, Undefined)
    with pytest.raises(ConfigError, match="of another model"):
        compare_scores({"same": benefit}, planted_report(benefit), files)


def test_a_sweep_of_another_model_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    save(planted_report([1.0, 2.0, 3.0]), tmp_path / "sweep.json")
    with pytest.raises(ConfigError, match="another model"):
        ask(tiny_model("llama", layers=3), tmp_path / "sweep.json")
    with pytest.raises(ConfigError, match="2 sweeps given; analyze weights compares with one"):
        ask(tiny_model("llama", layers=3), tmp_path / "sweep.json", tmp_path / "sweep.json")
