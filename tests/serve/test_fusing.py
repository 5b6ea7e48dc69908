"""Modules that share their input share a launch, and compute what they would compute apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_fairness_kernels.int4_matmul import Columns
from quant_fairness_kernels.nibble_planes import pack_planes
from torch import Tensor, nn

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.serve.fusing import (
    FusedPart,
    Prepared,
    SharedLaunch,
    launches,
    put_fused,
    reason_against_fusing,
)
from quant_fairness_plugin.serve.linear import QuantizedLinear
from quant_fairness_plugin.serve.load import load_quantized
from tests.export.build import TEXTS, quantize_with_columns
from tests.serve.conftest import Served
from tests.serve.test_linear import random_weight

ROW = torch.arange(1, 18).unsqueeze(0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=ROW).logits
    return found.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def linears(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_modules_apart(served: Served, family: str, dtype: torch.dtype) -> None:
    fused, apart = (load_quantized(served(family), kernel="cpu", dtype=dtype, fuse=fuse) for fuse in (True, False))
    assert len(linears(apart)) == (6 if family == "opt" else 7)
    assert len(linears(fused)) == 4
    # A wider matrix may be added up in another order: the last bit of the type, over two layers.
    assert difference(logits(fused), logits(apart)) < (1e-6 if dtype == torch.float32 else 0.02)


def test_biases_that_only_some_modules_have_are_zero_for_the_others() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, rows) for name, rows in (("q", 17), ("k", 5))})
    parts = {
        name: Prepared(random_weight(rows, 64, 2)[0], bias, None)
        for name, rows, bias in (("q", 17, torch.ones(17)), ("k", 5, None))
    }
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = {name: part.linear(dtype=torch.float32, on_cpu=True)(x) for name, part in parts.items()}
    put_fused(model, parts, dtype=torch.float32, on_cpu=True)
    for name, out in expected.items():
        torch.testing.assert_close(model[name](x), out, rtol=1e-6, atol=1e-6)
        assert (model[name].in_features, model[name].out_features) == (64, parts[name].planes.N)
    assert "64, 5, part 2 of 2" in repr(model["k"])


def test_columns_are_in_the_same_launch(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized = quantize_with_columns(tiny_model("llama"))
    export(quantized, tmp_path / "out", texts=TEXTS)
    model = load_quantized(tmp_path / "out", kernel="cpu", dtype=torch.float32, fuse=True)
    assert len(linears(model)) == 4
    assert difference(logits(model), logits(load_quantized(tmp_path / "out", kernel="reference"))) < 1e-5


def test_generation_gives_the_same_tokens(served: Served) -> None:
    made = []
    for fuse in (True, False):
        model: Any = load_quantized(served(), kernel="cpu", dtype=torch.float32, fuse=fuse)
        made.append(model.generate(ROW[:, :3], max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*made)


class Counting(nn.Module):
    """Two modules as one, whose features are the input times 1, 2, 3 and 4; counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.in_features = 0, 1

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * torch.arange(1.0, 5.0)


def test_each_input_is_computed_once_and_nothing_is_kept() -> None:
    counting = Counting()
    shared = SharedLaunch(counting, (1, 3))  # type: ignore[arg-type]
    first, second = FusedPart(shared, 0), FusedPart(shared, 1)
    x = torch.ones(2, 1)
    assert first(x).tolist() == [[1.0], [1.0]]
    assert second(x).tolist() == [[2.0, 3.0, 4.0]] * 2
    assert counting.runs == 1
    assert shared._input is None
    assert shared._ready == [None, None]
    # The other order, the same tensor with other values, and an equal tensor: each is another input.
    second(x)
    x.mul_(2)
    assert first(x).tolist() == [[2.0], [2.0]]
    assert counting.runs == 3
    assert second(x.clone()).tolist() == [[4.0, 6.0, 8.0]] * 2
    assert counting.runs == 4
    assert first(x).tolist() == [[2.0], [2.0]]
    assert first(x).tolist() == [[2.0], [2.0]]
    assert counting.runs == 6


def test_inference_mode_and_copies_work() -> None:
    shared = SharedLaunch(Counting(), (1, 3))  # type: ignore[arg-type]
    model = deepcopy(nn.ModuleList([FusedPart(shared, 0), FusedPart(shared, 1)]))
    with torch.inference_mode():
        x = torch.ones(1, 1)
        assert [part(x).sum().item() for part in model] == [1.0, 9.0]
    copied: Any = model[0]
    assert copied.shared is not shared
    assert copied.shared.linear.runs == 1


def prepared(rows: int, *, order: Tensor | None = None, groups: int = 2, kept: tuple[int, ...] = ()) -> Prepared:
    integers = torch.full((rows, 64), 3, dtype=torch.uint8)
    scales, zeros = torch.ones(rows, groups).half(), torch.full((rows, groups), 8, dtype=torch.uint8)
    columns = Columns(torch.tensor(kept, dtype=torch.int32), torch.ones(len(kept), rows).half()) if kept else None
    return Prepared(pack_planes(integers, scales, zeros, group_index=order), None, columns)


def test_what_cannot_share_a_launch_is_said() -> None:
    backwards = torch.arange(64).flip(0) // 32
    assert reason_against_fusing([prepared(3), prepared(5)]) is None
    assert reason_against_fusing([prepared(3, order=backwards), prepared(5, order=backwards)]) is None
    assert reason_against_fusing([prepared(3), prepared(5, order=backwards)]) == "their act-order permutations differ"
    assert "groups and types differ" in str(reason_against_fusing([prepared(3), prepared(5, groups=1)]))
    assert reason_against_fusing([prepared(3, kept=(1, 2)), prepared(5, kept=(1, 2))]) is None
    different = "they keep different input channels in 16 bit"
    assert reason_against_fusing([prepared(3, kept=(1, 2)), prepared(5, kept=(1, 3))]) == different
    assert reason_against_fusing([prepared(3, kept=(1,)), prepared(5)]) == different


def test_modules_that_stay_apart_are_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quant_fairness_plugin.serve.load.reason_against_fusing", lambda parts: "the test says so")
    with caplog.at_level(logging.INFO):
        model = load_quantized(served(), kernel="cpu", dtype=torch.float32, fuse=True)
    assert len(linears(model)) == 7
    assert "layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj are computed apart: the test says so" in caplog.text


def test_8_bit_modules_are_no_part_of_a_launch(served: Served) -> None:
    folder = served("llama", "compressed-tensors", overrides={"layers.0.gate_up": "int8"})
    model = load_quantized(folder, kernel="cpu", dtype=torch.float32, fuse=True)
    assert len(linears(model)) == 3
    assert difference(logits(model), logits(load_quantized(folder, kernel="reference"))) < 1e-5


def test_groups_are_those_of_the_family_and_only_of_quantized_modules(served: Served) -> None:
    model = load_quantized(served(), kernel="reference")
    block = "model.layers.0"
    names = [
        f"{block}.self_attn.q_proj",
        f"{block}.self_attn.v_proj",
        f"{block}.self_attn.o_proj",
        f"{block}.mlp.up_proj",
    ]
    assert launches(model, names, fuse=True) == [(names[0], names[1]), (names[2],), (names[3],)]
    assert launches(model, names, fuse=False) == [(name,) for name in names]
    assert launches(nn.Linear(1, 1), ["a"], fuse=True) == [("a",)]


def test_the_reference_has_nothing_to_fuse(served: Served) -> None:
    with pytest.raises(ConfigError, match="fuse has no effect on kernel 'reference'"):
        load_quantized(served(), kernel="reference", fuse=True)
