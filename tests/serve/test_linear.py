"""`QuantizedLinear` computes `x @ W^T + bias` for any size, and refuses what would go wrong unseen."""

from __future__ import annotations

import pytest
import torch
from quant_fairness_kernels import cpu_matmul as cpu_module
from quant_fairness_kernels.nibble_planes import NibblePlanes, pack_planes
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.serve.linear import QuantizedLinear, check_protected, put_dense, put_module


def random_weight(rows: int, cols: int, groups: int, *, symmetric: bool = True) -> tuple[NibblePlanes, Tensor]:
    """Planes, and the weight that they stand for, computed from the same integers one by one."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    integers = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).half()
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    zeros = torch.full_like(zeros, 8) if symmetric else zeros
    weight = torch.empty(rows, cols)
    for n in range(rows):
        for k in range(cols):
            g = k // (cols // groups)
            weight[n, k] = (int(integers[n, k]) - int(zeros[n, g])) * float(scales[n, g])
    return pack_planes(integers, scales, zeros), weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "cols", "groups"), [(17, 33, 1), (1, 96, 3), (5, 64, 1)])
@pytest.mark.parametrize("tokens", [(1,), (3,), (2, 3), (0,)])
def test_float32_is_the_plain_product(
    rows: int, cols: int, groups: int, symmetric: bool, tokens: tuple[int, ...]
) -> None:
    planes, weight = random_weight(rows, cols, groups, symmetric=symmetric)
    bias = torch.linspace(-1, 1, rows)
    linear = QuantizedLinear(planes, bias=bias, dtype=torch.float32, on_cpu=True)
    x = torch.randn(*tokens, cols, generator=torch.Generator().manual_seed(0))
    assert linear(x).shape == (*tokens, rows)
    # float64 is the truth; float32 errs by 2^-24 in each of at most 96 additions
    torch.testing.assert_close(linear(x).double(), x.double() @ weight.double().t() + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_by_operator", [0, 4])
def test_bfloat16_errs_by_no_more_than_its_rounding(monkeypatch: pytest.MonkeyPatch, rows_by_operator: int) -> None:
    monkeypatch.setattr(cpu_module, "measured_rows", lambda N, K: rows_by_operator)  # noqa: N803
    planes, weight = random_weight(17, 64, 2, symmetric=False)
    linear = QuantizedLinear(planes, bias=torch.ones(17), dtype=torch.bfloat16, on_cpu=True)
    for tokens in (1, 4, 5):
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        expected = x.double() @ weight.double().t() + 1
        # weights, scales and results are each rounded to 8 bits: 2^-8 of the sum of magnitudes, three times
        bound = 3 * 2**-8 * (x.double().abs() @ weight.double().abs().t() + 1)
        assert bool(((linear(x).double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(
    ("dtype", "rows_by_operator", "bytes_"),
    [(torch.bfloat16, 4, 2.5), (torch.bfloat16, 0, 2), (torch.float16, 4, 2), (torch.float32, 4, 4)],
)
def test_the_cpu_path_needs_what_the_docstring_says(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows_by_operator: int, bytes_: float
) -> None:
    monkeypatch.setattr(cpu_module, "measured_rows", lambda N, K: rows_by_operator)  # noqa: N803
    linear = QuantizedLinear(random_weight(32, 64, 1)[0], bias=None, dtype=dtype, on_cpu=True)
    assert linear._cpu is not None
    held = [linear._cpu.packed, linear._cpu.dense]
    assert sum(tensor.nbytes for tensor in held if tensor is not None) == bytes_ * 32 * 64
    assert linear._cpu.planes is None
    assert not list(linear.buffers())


def test_activations_need_not_be_contiguous() -> None:
    planes, weight = random_weight(17, 64, 2)
    linear = QuantizedLinear(planes, bias=None, dtype=torch.float32, on_cpu=True)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).t()
    torch.testing.assert_close(linear(x), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_other_activations_are_refused() -> None:
    linear = QuantizedLinear(random_weight(17, 64, 2)[0], bias=None, dtype=torch.bfloat16, on_cpu=True)
    with pytest.raises(ValueError, match="this weight takes torch.bfloat16"):
        linear(torch.zeros(1, 64))
    with pytest.raises(ValueError, match=r"takes torch.bfloat16 \[..., 64\]"):
        linear(torch.zeros(1, 63, dtype=torch.bfloat16))


def test_the_triton_path_needs_a_gpu_and_its_weight_moves_with_the_module() -> None:
    planes, _ = random_weight(17, 64, 2)
    linear = QuantizedLinear(planes, bias=torch.ones(17), dtype=torch.float16, on_cpu=False)
    assert {name for name, _ in linear.named_buffers()} == {"bias", "words", "scales", "counters"}
    with pytest.raises(RuntimeError, match="the Triton kernels cannot run: they run on an NVIDIA GPU"):
        linear(torch.zeros(1, 64).half())
    moved = linear.to("meta")
    assert moved.words.is_meta
    assert moved.scales.is_meta


def test_it_says_what_it_is_and_cannot_be_saved() -> None:
    model = nn.Sequential(QuantizedLinear(random_weight(17, 64, 2)[0], bias=None, dtype=torch.float32, on_cpu=True))
    assert "QuantizedLinear(64, 17, bias=False, kernel=cpu)" in repr(model)
    with pytest.raises(UnsupportedModelError, match="0 holds a 4-bit weight in a kernel's layout"):
        model.state_dict()


def test_modules_are_put_in_place() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 17), Conv1D(17, 64)))
    linear = QuantizedLinear(random_weight(17, 64, 2)[0], bias=None, dtype=torch.float32, on_cpu=True)
    put_module(model, "0.0", linear)
    assert model.get_submodule("0.0") is linear
    assert not linear.training
    weight = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    put_dense(model, "0.1", weight, dtype=torch.bfloat16)
    assert torch.equal(model.get_submodule("0.1").weight, weight.t().bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda linear: linear.half(), r"b is protected, and holds a weight in torch\.float16"),
        (lambda linear: linear.to("meta"), r"b is protected, and holds a weight in torch\.float32 on meta"),
        (lambda linear: delattr(linear, "weight"), "b is protected, and holds no plain weight"),
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)),
            r"b is protected, and holds a weight in torch\.int8",
        ),
    ],
)
def test_protected_modules_must_be_plain(change: object, message: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3).half()})
    assert check_protected(model, dtype=torch.float32, replaced=["c"]) == 2
    assert callable(change)
    change(model["b"])
    with pytest.raises(UnsupportedModelError, match=message):
        check_protected(model, dtype=torch.float32, replaced=["c"])
