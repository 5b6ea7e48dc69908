from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant_fairness_plugin.model.linear import is_conv1d, is_linear, linear_weight, set_linear_weight

ROWS, COLS = 17, 33


def _module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(COLS, ROWS, bias=False) if kind == "linear" else Conv1D(ROWS, COLS)


def _apply(weight: Tensor, x: Tensor) -> Tensor:
    """The definition, element by element."""
    return torch.tensor([[sum(w * v for w, v in zip(row, vector, strict=True)) for row in weight] for vector in x])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_weight_is_out_features_by_in_features(kind: str) -> None:
    module, x = _module(kind), torch.randn(3, COLS)
    weight = linear_weight(module)
    assert weight.shape == (ROWS, COLS)
    assert not weight.requires_grad
    torch.testing.assert_close(module(x), _apply(weight, x), atol=1e-5, rtol=1e-5)  # float32 sums of 33 terms


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_setting_a_weight_writes_into_the_module_and_reads_back_exactly(kind: str) -> None:
    module, x = _module(kind), torch.randn(3, COLS)
    storage, weight = module.weight.data_ptr(), torch.randn(ROWS, COLS)
    set_linear_weight(module, weight)
    assert torch.equal(linear_weight(module), weight)
    assert module.weight.data_ptr() == storage
    assert module.weight.requires_grad
    torch.testing.assert_close(module(x), _apply(weight, x), atol=1e-5, rtol=1e-5)


def test_setting_a_weight_keeps_the_modules_dtype() -> None:
    module = _module("linear").to(torch.bfloat16)
    set_linear_weight(module, torch.full((ROWS, COLS), 1 / 3))
    assert module.weight.dtype == torch.bfloat16
    assert linear_weight(module)[0, 0] == torch.tensor(1 / 3).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_transposed_weight_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"weight of shape \[33, 17\] does not fit a linear module that is \[17, 33\]"):
        set_linear_weight(_module(kind), torch.zeros(COLS, ROWS))


def test_a_weight_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight of shape \[1, 33\] does not fit"):
        set_linear_weight(_module("linear"), torch.zeros(1, COLS))


@pytest.mark.parametrize("module", [nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 1)])
def test_other_modules_are_not_linear(module: nn.Module) -> None:
    assert not is_linear(module)
    assert not is_conv1d(module)
    with pytest.raises(TypeError, match="is not a linear module; expected nn.Linear or Conv1D"):
        linear_weight(module)


def test_conv1d_is_told_from_linear() -> None:
    assert [is_conv1d(_module(kind)) for kind in ("linear", "conv1d")] == [False, True]
    assert all(is_linear(_module(kind)) for kind in ("linear", "conv1d"))
