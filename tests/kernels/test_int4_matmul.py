"""The operator without a GPU: the reference path against the naive one, tracing, and what bad input gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quant_fairness_kernels import int4_matmul as module
from quant_fairness_kernels.int4_matmul import Columns, int4_matmul
from quant_fairness_kernels.naive import naive_dequantize, naive_matmul
from quant_fairness_kernels.nibble_planes import NibblePlanes, pack_planes
from quant_fairness_kernels.verify import TOLERANCE, relative_error
from torch import Tensor

from tests.kernels.weights import activations, plain_weight, shuffled_groups


@pytest.fixture(scope="module")
def planes() -> NibblePlanes:
    return pack_planes(*plain_weight(40, 96, 3))


def extras(dtype: torch.dtype = torch.float16) -> tuple[Columns, Tensor, Tensor]:
    index = torch.tensor([0, 50, 95], dtype=torch.int32)
    columns = Columns(index, activations(3, 40, dtype=dtype, seed=2))
    return columns, activations(7, 96, dtype=dtype, seed=3) / 20, activations(47, dtype=dtype, seed=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
@pytest.mark.parametrize("act_order", [True, False])
def test_all_parts_together_agree_with_the_formula(
    dtype: torch.dtype, leading: tuple[int, ...], act_order: bool
) -> None:
    weight = plain_weight(40, 96, 3, symmetric=False, dtype=dtype)
    index = shuffled_groups(96, 3) if act_order else None
    columns, dense, bias = extras(dtype)
    x = activations(*leading, 96, dtype=dtype)
    planes = pack_planes(*weight, group_index=index)
    got = int4_matmul(x, planes, columns=columns, dense=dense, bias=bias)
    assert got.shape == (*leading, 47)
    assert got.dtype == dtype
    truth = naive_matmul(
        x,
        naive_dequantize(*weight, group_index=index),
        columns=(columns.index, columns.weights),
        dense=dense,
        bias=bias,
    )
    assert relative_error(got, truth) <= TOLERANCE[dtype] / 2  # nothing is rounded but the result


def test_silu_mul_agrees_with_the_formula(planes: NibblePlanes) -> None:
    x = activations(9, 96)
    truth = naive_matmul(x, naive_dequantize(*plain_weight(40, 96, 3)), silu_mul=True)
    got = int4_matmul(x, planes, silu_mul=True)
    assert got.shape == (9, 20)
    assert relative_error(got, truth) <= TOLERANCE[torch.float16] / 2


def test_a_small_mistake_is_larger_than_the_tolerance(planes: NibblePlanes) -> None:
    x, weight = activations(9, 96), plain_weight(40, 96, 3)
    wrong = weight.integers.clone()
    wrong[0, 0] ^= 8  # one bit of 40 x 96 integers
    truth = naive_matmul(x, naive_dequantize(wrong, weight.scales, weight.zeros))
    assert relative_error(int4_matmul(x, planes), truth) > TOLERANCE[torch.float16]


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_no_rows_give_no_rows(planes: NibblePlanes, shape: tuple[int, ...]) -> None:
    _, dense, _ = extras()
    assert int4_matmul(activations(*shape), planes, dense=dense).shape == (*shape[:-1], 47)
    assert int4_matmul(activations(*shape), planes, silu_mul=True).shape == (*shape[:-1], 20)


def test_rows_need_not_be_contiguous_but_channels_must(planes: NibblePlanes) -> None:
    x = activations(8, 96)
    assert torch.equal(int4_matmul(x[::2], planes), int4_matmul(x[::2].contiguous(), planes))
    with pytest.raises(ValueError, match="x has stride 8 along K"):
        int4_matmul(x.reshape(96, 8).t(), planes)


def test_it_compiles_as_one_graph_and_passes_the_operator_checks(planes: NibblePlanes) -> None:
    columns, dense, bias = extras()

    def layer(x: Tensor) -> Tensor:
        return int4_matmul(x, planes, columns=columns, dense=dense, bias=bias) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (activations(4, 96), activations(2, 3, 96)):
        assert torch.equal(compiled(x), layer(x))
    arguments = (
        activations(4, 96), planes.words, planes.scales, planes.counters, None, columns.index, columns.weights, dense,
        bias, [40, 96, 3], True, False, False,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.quant_fairness.int4_matmul.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_it_exports(planes: NibblePlanes) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return int4_matmul(x, planes)

    x = activations(4, 96)
    exported = torch.export.export(Layer(), (x,))
    assert "quant_fairness.int4_matmul" in str(exported.graph)
    assert torch.equal(exported.module()(x), int4_matmul(x, planes))


def with_stride(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


BAD: list[tuple[str, Callable[[NibblePlanes], object], str]] = [
    ("K", lambda p: int4_matmul(activations(2, 95), p), r"x is \[2, 95\]; its last dimension must be K = 96"),
    ("scalar", lambda p: int4_matmul(torch.tensor(1.0), p), r"x is \[\]; its last dimension"),
    ("dtype", lambda p: int4_matmul(activations(2, 96, dtype=torch.bfloat16), p), "x is torch.bfloat16; this weight"),
    ("float32", lambda p: int4_matmul(torch.randn(2, 96), p), "x is torch.float32; this weight takes torch.float16"),
    ("device", lambda p: int4_matmul(activations(2, 96).to("meta"), p), "weight is on cpu and x on meta"),
    ("dense", lambda p: int4_matmul(activations(2, 96), p, dense=activations(7, 95)), r"dense is \[7, 95\]; it must"),
    (
        "dense strides",
        lambda p: int4_matmul(activations(2, 96), p, dense=with_stride(activations(7, 96))),
        r"dense is not contiguous \(strides \[1, 7\]\)",
    ),
    ("bias", lambda p: int4_matmul(activations(2, 96), p, bias=activations(41)), r"bias is \[41\]; it must be \[40\]"),
    (
        "index type",
        lambda p: int4_matmul(activations(2, 96), p, columns=Columns(torch.tensor([1]), activations(1, 40))),
        "columns.index is torch.int64; this weight takes torch.int32",
    ),
    (
        "columns",
        lambda p: int4_matmul(
            activations(2, 96), p, columns=Columns(torch.tensor([1], dtype=torch.int32), activations(2, 40))
        ),
        r"columns.weights is \[2, 40\]; it must be \[1, 40\]",
    ),
    (
        "silu and dense",
        lambda p: int4_matmul(activations(2, 96), p, dense=activations(7, 96), silu_mul=True),
        "no dense ones",
    ),
    ("kernel", lambda p: int4_matmul(activations(2, 96), p, kernel="cuda"), "unknown kernel 'cuda'; accepted are auto"),  # type: ignore[arg-type] # the refusal is the test
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_refused_with_its_value(
    planes: NibblePlanes, call: Callable[[NibblePlanes], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(planes)


def test_more_elements_than_32_bits_index_are_refused(planes: NibblePlanes) -> None:
    meta = planes.to("meta")
    with pytest.raises(ValueError, match="x has 2160000000 elements; the kernels index up to 2147483647"):
        int4_matmul(torch.empty(22_500_000, 96, dtype=torch.float16, device="meta"), meta)
    with pytest.raises(ValueError, match="the result has 2400000000 elements"):
        int4_matmul(torch.empty(1, 96, dtype=torch.float16, device="meta").expand(60_000_000, 96), meta)


def test_asking_for_triton_without_a_gpu_says_what_is_missing(
    planes: NibblePlanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="run on an NVIDIA GPU, and the tensors are on cpu.*kernel='reference'"):
        int4_matmul(activations(2, 96), planes, kernel="triton")
    monkeypatch.setattr("quant_fairness_kernels.launch.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "quant-fairness\[triton\]"'):
        int4_matmul(activations(2, 96), planes, kernel="triton")


def test_the_package_imports_without_triton() -> None:
    assert "triton" not in module.__dict__
