"""The CPU path: torch's 4-bit operator and the cached weight give what the formula gives, on every shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quant_fairness_kernels import cpu_matmul as module
from quant_fairness_kernels.cpu_matmul import MeasuredTable, cpu_matmul, measured_rows, measured_table, prepare_cpu
from quant_fairness_kernels.int4_matmul import Columns
from quant_fairness_kernels.naive import naive_dequantize, naive_matmul
from quant_fairness_kernels.nibble_planes import pack_planes
from quant_fairness_kernels.verify import TOLERANCE, relative_error

from tests.kernels.weights import activations, plain_weight, shuffled_groups

SHAPES = [(32, 64, 1), (17, 128, 4), (130, 384, 3), (33, 96, 3), (48, 256, 1)]


@pytest.mark.parametrize(("N", "K", "groups"), SHAPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("M", [1, 3, 9])
def test_both_ways_agree_with_the_formula(N: int, K: int, groups: int, symmetric: bool, M: int) -> None:
    weight = plain_weight(N, K, groups, symmetric=symmetric, dtype=torch.bfloat16)
    x = activations(M, K, dtype=torch.bfloat16)
    prepared = prepare_cpu(pack_planes(*weight), rows=3)
    assert prepared.packed is not None
    truth = naive_matmul(x, naive_dequantize(*weight))
    # The operator rounds offsets and the cached weight rounds weights to bfloat16: one roundoff beside the result's.
    assert relative_error(cpu_matmul(x, prepared), truth) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("M", [2, 5])
@pytest.mark.parametrize("keep_dense", [True, False])
def test_all_parts_together(M: int, keep_dense: bool) -> None:
    weight = plain_weight(40, 128, 4, symmetric=False, dtype=torch.bfloat16)
    index = shuffled_groups(128, 4)
    columns = Columns(torch.tensor([3, 100], dtype=torch.int32), activations(2, 40, dtype=torch.bfloat16, seed=5))
    dense, bias = activations(6, 128, dtype=torch.bfloat16) / 20, activations(46, dtype=torch.bfloat16)
    planes = pack_planes(*weight, group_index=index)
    prepared = prepare_cpu(planes, columns=columns, dense=dense, rows=3, keep_dense=keep_dense)
    assert (prepared.dense is not None) == keep_dense
    x = activations(1, M, 128, dtype=torch.bfloat16)
    got = cpu_matmul(x, prepared, bias=bias)
    assert got.shape == (1, M, 46)
    weights = naive_dequantize(*weight, group_index=index)
    truth = naive_matmul(x, weights, columns=(columns.index, columns.weights), dense=dense, bias=bias)
    assert relative_error(got, truth) <= TOLERANCE[torch.bfloat16]


def test_float32_is_exact_to_float32() -> None:
    weight = plain_weight(33, 96, 3, symmetric=False)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    prepared = prepare_cpu(pack_planes(*weight), dtype=torch.float32, rows=3)
    assert prepared.packed is None  # torch's operator would fall into a scalar loop
    # 96 products are summed: the bound on the error grows with their number.
    assert relative_error(cpu_matmul(x, prepared), naive_matmul(x, naive_dequantize(*weight))) <= 96 * 2**-24


def test_silu_mul_follows_the_formula() -> None:
    weight = plain_weight(32, 64, 2, dtype=torch.bfloat16)
    x = activations(4, 64, dtype=torch.bfloat16)
    got = cpu_matmul(x, prepare_cpu(pack_planes(*weight), rows=0), silu_mul=True)
    truth = naive_matmul(x, naive_dequantize(*weight), silu_mul=True)
    # Rounded before, inside and after the product.
    assert relative_error(got, truth) <= 3 * TOLERANCE[torch.bfloat16]


def test_groups_that_torch_refuses_go_through_the_cached_weight() -> None:
    weight = plain_weight(16, 50, 1, dtype=torch.bfloat16)
    prepared = prepare_cpu(pack_planes(*weight), rows=8)
    assert prepared.rows == 0
    x = activations(1, 50, dtype=torch.bfloat16)
    assert relative_error(cpu_matmul(x, prepared), naive_matmul(x, naive_dequantize(*weight))) <= 8e-3


def test_it_compiles_as_one_graph() -> None:
    prepared = prepare_cpu(pack_planes(*plain_weight(32, 64, 2, dtype=torch.bfloat16)), rows=2)
    compiled = torch.compile(lambda x: cpu_matmul(x, prepared), fullgraph=True, backend="aot_eager", dynamic=False)
    for M in (1, 5):
        x = activations(M, 64, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), cpu_matmul(x, prepared))


def test_thresholds_come_from_the_largest_measured_shape_within(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {(2048, 2048): 4, (4096, 4096): 8}
    here = MeasuredTable(torch.backends.cpu.get_cpu_capability(), rows)
    monkeypatch.setattr(module, "measured_table", lambda: here)
    assert [measured_rows(N, N) for N in (1024, 2048, 3000, 4096, 9000)] == [0, 4, 4, 8, 8]
    monkeypatch.setattr(module, "measured_table", lambda: MeasuredTable("another", rows))
    assert measured_rows(4096, 4096) == 0


def test_the_shipped_table_follows_from_the_kept_rows() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "int4_matmul.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert {row["capability"] for row in kept} == {measured_table().capability}
    assert {(row["N"], row["K"]) for row in kept} == set(measured_table().rows)
    for (N, K), most in measured_table().rows.items():
        gains = {
            row["M"]: row["bfloat16_microseconds"] / row["int4_microseconds"]
            for row in kept
            if (row["N"], row["K"]) == (N, K)
        }
        assert most in {0, *gains}
        assert all(gain > 1 for M, gain in gains.items() if M <= most)


def test_bad_input_is_refused_with_its_value() -> None:
    planes = pack_planes(*plain_weight(16, 64, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="activations in torch.int8 are not supported"):
        prepare_cpu(planes, dtype=torch.int8)
    with pytest.raises(ValueError, match="the weight is on meta"):
        prepare_cpu(planes.to("meta"))
    with pytest.raises(ValueError, match=r"x is torch.float32 \[2, 64\] on cpu; this weight takes torch.bfloat16"):
        cpu_matmul(torch.randn(2, 64), prepare_cpu(planes))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 \[\] on cpu; this weight takes"):
        cpu_matmul(torch.tensor(1.0).bfloat16(), prepare_cpu(planes))
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 \[2, 64\] on meta"):
        cpu_matmul(torch.empty(2, 64, dtype=torch.bfloat16, device="meta"), prepare_cpu(planes))
    with pytest.raises(ValueError, match=r"bias is \[1\]; it must be \[16\]"):
        cpu_matmul(torch.zeros(2, 64).bfloat16(), prepare_cpu(planes), bias=torch.ones(1))
    with pytest.raises(ValueError, match=r"dense is \[2, 63\]; it must be \[D, 64\]"):
        prepare_cpu(planes, dense=torch.zeros(2, 63))
    odd = prepare_cpu(pack_planes(*plain_weight(17, 64, 2, dtype=torch.bfloat16)))
    with pytest.raises(
        ValueError, match="silu_mul needs an even number of features, gates and their partners; this has 17"
    ):
        cpu_matmul(torch.zeros(2, 64).bfloat16(), odd, silu_mul=True)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        ([64], (1, 16), r"columns name channels 64..64; accepted are 0..63"),
        ([3, -1], (2, 16), r"columns name channels -1..3; accepted are 0..63"),
        ([3, 5, 3], (3, 16), "columns name 1 channels more than once"),
        ([3], (2, 16), r"columns are torch.int32 \[1\] with weights \[2, 16\]; they must be .* \[C, 16\]"),
        ([3], (1, 15), r"with weights \[1, 15\]"),
    ],
)
def test_columns_that_do_not_fit_are_refused(index: list[int], shape: tuple[int, ...], message: str) -> None:
    planes = pack_planes(*plain_weight(16, 64, 2, dtype=torch.bfloat16))
    columns = Columns(torch.tensor(index, dtype=torch.int32), torch.zeros(shape).bfloat16())
    with pytest.raises(ValueError, match=message):
        prepare_cpu(planes, columns=columns)


def test_no_columns_and_no_rows_are_nothing_special() -> None:
    planes = pack_planes(*plain_weight(16, 64, 2, dtype=torch.bfloat16))
    none = Columns(torch.empty(0, dtype=torch.int32), torch.empty(0, 16).bfloat16())
    x = activations(3, 64, dtype=torch.bfloat16)
    assert torch.equal(cpu_matmul(x, prepare_cpu(planes, columns=none)), cpu_matmul(x, prepare_cpu(planes)))
    assert cpu_matmul(x[:0], prepare_cpu(planes), silu_mul=True).shape == (0, 8)
    assert torch.equal(cpu_matmul(x.t().contiguous().t(), prepare_cpu(planes)), cpu_matmul(x, prepare_cpu(planes)))
