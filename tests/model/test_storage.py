"""Values that are checked before they are stored."""

from __future__ import annotations

import pytest
import torch

from quant_fairness_plugin.model.storage import all_finite

KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 17, 63, 129, 4097])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_one_broken_value_is_found_wherever_it_is(kind: torch.dtype, size: int, broken: float) -> None:
    whole = torch.linspace(-3, 3, size)
    assert all_finite(whole.to(kind))
    for place in {0, size // 2, size - 1}:
        value = whole.clone()
        value[place] = broken
        assert not all_finite(value.to(kind))


def test_nothing_is_finite_and_so_are_integers_and_a_transposed_matrix() -> None:
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.arange(5))
    assert all_finite(torch.ones(3, 4).t())
    assert not all_finite(torch.tensor([[1.0, float("nan")]] * 3).t())
