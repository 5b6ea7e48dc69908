"""What quantizing a block takes, counted beforehand, against what is really held."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.quantize import gptq, moments, refinement
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.quantize.memory import count_quantize_needs
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.moments import working_dtype
from quant_fairness_plugin.quantize.refinement import best_scales
from quant_fairness_plugin.quantize.workplace import fusion_groups
from tests.planning import quantize_layers
from tests.quantize.conftest import small_texts

GRID = Grid(group_size=32)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside it and not yet gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


def test_tensors_are_counted_as_long_as_they_are_held() -> None:
    with Held() as held:
        first = torch.zeros(1000)
        second = first + 1
        view = first[10:]
        assert held.now == 8000
        del first
        assert held.now == 8000
        del view, second
        assert held.now == 0
    assert held.most == 8000


@pytest.mark.parametrize(("effort", "columns"), [("normal", 0.0), ("fast", 0.0), ("normal", 0.1)])
def test_what_is_counted_is_held_and_not_much_less(
    tiny_model: Callable[..., Path], effort: str, columns: float
) -> None:
    """At this width libraries' own work spaces, which nobody can count, are small beside the matrices."""
    streamed = open_streamed(str(tiny_model("llama", width=256)))
    rows = build_calibration(streamed.tokenizer, small_texts(), row_tokens=24)
    needs = count_quantize_needs(
        {name: tuple(value.shape) for name, value in streamed.model.named_parameters()},
        fusion_groups(streamed),
        blocks=streamed.family.blocks,
        tokens=48,
        compares=effort == "normal" and not columns,
        columns=bool(columns),
    )
    with Held() as held:
        quantize_layers(
            streamed, [], grid=GRID, method=Gptq().at(effort), calibration=rows, batch_tokens=48, columns=columns
        )
    assert needs.least / 2 < held.most <= needs.least


def test_equations_for_scales_are_held_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small groups they would be many times the weight; rows do not depend on each other."""
    weight = torch.randn(64, 256)
    given = torch.randn(600, 256, dtype=torch.float64)
    tensor = quantize_rtn(weight, Grid(group_size=32), scale_dtype=torch.float16)
    with Held() as all_rows:
        whole = best_scales(tensor, weight.double() @ (given.T @ given), given.T @ given)
    monkeypatch.setattr(refinement, "SYSTEM_VALUES", 5 * 8**2)
    with Held() as some_rows:
        pieces = best_scales(tensor, weight.double() @ (given.T @ given), given.T @ given)
    torch.testing.assert_close(pieces.scales, whole.scales, rtol=2**-10, atol=0)  # a last bit of float16
    assert some_rows.most < all_rows.most


def test_wide_modules_are_solved_in_float32(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert working_dtype(torch.device("cpu"), moments.WIDE_COLUMNS) == torch.float64
    assert working_dtype(torch.device("cpu"), moments.WIDE_COLUMNS + 1) == torch.float32
    folder = str(tiny_model("llama"))
    streamed = open_streamed(folder)
    rows = build_calibration(streamed.tokenizer, small_texts(), row_tokens=24)
    given = {"grid": GRID, "method": "gptq", "calibration": rows, "batch_tokens": 48}
    wide = quantize_layers(streamed, [], **given)
    kinds = set()
    monkeypatch.setattr(moments, "WIDE_COLUMNS", 32)
    factor = gptq._inverse_factor
    monkeypatch.setattr(gptq, "_inverse_factor", lambda h, damp: (kinds.add((len(h), h.dtype)), factor(h, damp))[1])
    found = quantize_layers(open_streamed(folder), [], **given)
    assert {kind for columns, kind in kinds if columns > 32} == {torch.float32}
    assert {kind for columns, kind in kinds if columns <= 32} == {torch.float64}
    # A value near the middle between two integers may go the other way, and with it those behind it.
    for name, loss in wide.losses.items():
        assert found.losses[name] == pytest.approx(loss, rel=0.05), name
