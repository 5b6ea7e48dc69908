"""AWQ with folds proved by tracing: what several units read, grouped heads, norms of single heads, hybrids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import is_linear
from quant_fairness_plugin.model.load import LoadedModel, from_loaded
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.folding import model_folds
from tests.export.build import TEXTS
from tests.planning import quantize_layers
from tests.tiny import byte_tokenizer
from tests.traced import traced_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own code warns
GRID = Grid(bits=8, group_size=32, symmetric=False)
ROUNDING = 2
"""Times the damage of rounding to nearest, where nothing is folded. A scale that is folded by half costs far more
(`test_half_of_a_fold_would_be_seen`)."""


@torch.no_grad()
def loud(model_type: str) -> LoadedModel:
    """A model whose sources amplify each eighth channel: AWQ has something to scale."""
    loaded = from_loaded(traced_model(model_type), byte_tokenizer())
    for layer in range(loaded.layers):
        for fold in loaded.family.kind_of(layer).folds:
            source = loaded.block(layer).get_submodule(fold.source)
            if not is_linear(source):
                source.weight[::8] = 4.0 - fold.offset  # type: ignore[index,operator]
    return loaded


@torch.no_grad()
def logits(loaded: LoadedModel, weights: dict[str, Tensor]) -> Tensor:
    with swapped(loaded, weights):
        found: Tensor = loaded.model(torch.arange(3, 33)[None], use_cache=False).logits
    return found


def awq(loaded: LoadedModel, overrides: dict[str, Precision]) -> dict[str, Tensor]:
    calibration = build_calibration(byte_tokenizer(), TEXTS, row_tokens=8)
    quantized = quantize_layers(loaded, [1], method="awq", grid=GRID, overrides=overrides, calibration=calibration)
    assert quantized.folded
    assert {name.removesuffix(".weight") for name in quantized.folded}.isdisjoint(quantized.tensors)
    return quantized.dense_weights()


def rounding_damage(loaded: LoadedModel) -> Tensor:
    rounded = quantize_layers(loaded, [1], method="rtn", grid=GRID).dense_weights()
    return (logits(loaded, rounded) - logits(loaded, {})).norm()


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("cohere2", {}),
        ("cohere2", {"layers.0.gate_up": "fp16"}),  # reads the divided norm all the same
        ("falcon", {}),
        ("qwen3_5_text", {}),
        ("lfm2", {}),
        ("minicpm3", {}),
    ],
)
def test_awq_computes_the_same_model(model_type: str, overrides: dict[str, Precision]) -> None:
    loaded = loud(model_type)
    original = logits(loaded, {})
    weights = awq(loaded, overrides)
    assert 0 < (logits(loaded, weights) - original).norm() < ROUNDING * rounding_damage(loaded)
    if overrides:
        # The 16-bit module that reads the same norm has other values, which go into the checkpoint.
        assert "model.layers.0.mlp.gate_proj.weight" in weights


def test_half_of_a_fold_would_be_seen() -> None:
    loaded = loud("cohere2")
    original = logits(loaded, {})
    weights = {name: value for name, value in awq(loaded, {}).items() if "layernorm" not in name}
    assert (logits(loaded, weights) - original).norm() > 5 * ROUNDING * rounding_damage(loaded)


def test_values_of_grouped_heads_are_divided_by_one_scale_for_all_their_readers() -> None:
    fold = model_folds(loud("cohere2"), 0)["o"]
    assert (fold.source, fold.heads) == ("self_attn.v_proj", 2)
