"""Input channels in 16 bit: which ones, what is stored for them, and that the model gains by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.columns import choose_columns, decoupled
from quant_fairness_plugin.quantize.grid_rules import column_bytes, column_count
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from tests.planning import quantize_layers
from tests.quantize.test_stream import assert_untouched, state
from tests.quantize.test_stream_awq import make_loud

Load = Callable[..., LoadedModel]
GRID = Grid(bits=3, group_size=32)
SHARE = 0.1


def kept(loaded: LoadedModel, rows: CalibrationSet, method: str = "gptq", share: float = SHARE) -> QuantizedModel:
    grid = GRID if method == "gptq" else Grid(bits=3, group_size=32, symmetric=False)
    return quantize_layers(loaded, [], method=method, grid=grid, calibration=rows, columns=share)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "cols", "count"), [(0.01, 4096, 41), (0.01, 32, 1), (0.1, 33, 3), (0.5, 7, 4), (0.0, 99, 0)]
)
def test_a_share_is_the_nearest_number_of_channels(share: float, cols: int, count: int) -> None:
    assert column_count(share, cols) == count


def test_bytes_are_16_bit_a_weight_and_an_index_a_channel() -> None:
    assert column_bytes(5, 100, 0.03) == 3 * (5 * 2 + 4)
    assert column_bytes(5, 100, 0.0) == 0


def test_the_channels_that_lose_most_are_chosen_over_the_whole_fusion_group() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {name: torch.randn(rows, 33, generator=generator) for name, rows in (("q", 5), ("k", 3))}
    moments = {name: torch.rand(33, 33, generator=generator).double() for name in errors}
    loss = [
        sum(float(errors[m][n, k]) ** 2 * float(moments[m][k, k]) for m in errors for n in range(len(errors[m])))
        for k in range(33)
    ]
    expected = sorted(sorted(range(33), key=lambda k: -loss[k])[:3])
    assert choose_columns(errors, moments, 0.1).tolist() == expected
    # Inputs that were divided by a scale carry its inverse square.
    scale = torch.ones(33)
    scale[expected[0]] = 1e6
    assert expected[0] not in choose_columns(errors, moments, 0.1, scale=scale).tolist()


def test_decoupled_channels_share_nothing_with_the_others() -> None:
    hessian = torch.arange(1.0, 17.0).view(4, 4)
    expected = torch.tensor([[1, 0, 3, 0], [0, 6, 0, 8], [9, 0, 11, 0], [0, 14, 0, 16]]).float()
    assert torch.equal(decoupled(hessian, torch.tensor([1, 3], dtype=torch.int32)), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gptq_columns_hold_what_the_integers_lack(load: Load, rows: CalibrationSet, family: str) -> None:
    loaded = load(family)
    before = state(loaded)
    quantized = kept(loaded, rows)
    assert_untouched(loaded, before)
    assert quantized.columns.keys() == quantized.tensors.keys()
    for name, columns in quantized.columns.items():
        weight = linear_weight(loaded.model.get_submodule(name)).float()
        dense, index = quantized.tensors[name].dequantize(), columns.index.long()
        assert columns.index.dtype == torch.int32
        assert len(index) == round(SHARE * weight.shape[1])
        assert bool((index.diff() > 0).all())
        assert torch.equal(columns.delta, (weight - dense)[:, index].half())
        used = quantized.dense_weight(name)
        # float16 keeps 11 bits of the difference, which is at most half a step of the grid
        torch.testing.assert_close(used[:, index], weight[:, index], rtol=0, atol=2**-11 * float(weight.abs().max()))
        others = [k for k in range(weight.shape[1]) if k not in index.tolist()]
        assert torch.equal(used[:, others], dense[:, others])


def test_modules_of_a_fusion_group_keep_the_same_channels(load: Load, rows: CalibrationSet) -> None:
    columns = kept(load("llama"), rows).columns
    for layer in range(2):
        attention = [columns[f"model.layers.{layer}.self_attn.{name}_proj"].index for name in "qkv"]
        assert torch.equal(attention[0], attention[1])
        assert torch.equal(attention[0], attention[2])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_output_error_falls(load: Load, rows: CalibrationSet, method: str) -> None:
    loaded = load("llama")
    make_loud(loaded)
    without, with_columns = (kept(loaded, rows, method, share) for share in (0.0, 0.2))
    assert not without.columns
    # The first group is solved on the same inputs in both runs.
    for name in (f"model.layers.0.self_attn.{part}_proj" for part in "qkv"):
        assert with_columns.losses[name] < 0.7 * without.losses[name]
    assert mean_error(loaded, rows, with_columns) < mean_error(loaded, rows, without)


def test_awq_columns_follow_the_scales_that_are_folded_later(load: Load, rows: CalibrationSet) -> None:
    """With every channel kept, AWQ's folded model is the 16-bit one: also v and up, which are divided afterwards."""
    loaded = load("llama")
    make_loud(loaded)
    quantized = kept(loaded, rows, "awq", 1.0)
    assert any(float((t - 1).abs().max()) > 0.1 for name, t in quantized.folded.items() if "norm" in name)
    # float16 rounds what is folded, and the differences: 2^-11 each, over two layers
    assert mean_error(loaded, rows, quantized) < 2e-3


@torch.no_grad()
def mean_error(loaded: LoadedModel, rows: CalibrationSet, quantized: QuantizedModel) -> float:
    """Squared error of the logits over their squares, on the calibration rows."""
    own, found = logits(loaded, rows, {}), logits(loaded, rows, quantized.dense_weights())
    return float((own - found).square().sum() / own.square().sum())


@torch.no_grad()
def logits(loaded: LoadedModel, rows: CalibrationSet, weights: dict[str, Tensor]) -> Tensor:
    with swapped(loaded, weights):
        return torch.cat([loaded.model(torch.tensor([row])).logits[0] for part in rows.rows.values() for row in part])


def test_modules_of_8_bits_keep_none(load: Load, rows: CalibrationSet) -> None:
    quantized = quantize_layers(
        load("llama"), [], method="gptq", grid=GRID, calibration=rows, columns=SHARE, overrides={"layers.1": "int8"}
    )
    assert {name.split(".")[2] for name in quantized.columns} == {"0"}
    assert {name.split(".")[2] for name in quantized.tensors} == {"0", "1"}


def test_rounding_without_calibration_keeps_none(load: Load) -> None:
    with pytest.raises(ConfigError, match="columns 0.1 cannot be used with method 'rtn': which channels matter only"):
        quantize_layers(load("llama"), [], method="rtn", grid=GRID, columns=0.1)
