"""Other projects' kernels in the benchmark, without a GPU: stand-ins that take what the real packages document."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from quant_fairness_kernels import timing
from torch import Tensor

from tests.kernels.weights import PlainWeight, activations, plain_weight

N, K, GROUPS, COPIES = 256, 512, 4, 3
PEERS = ("gemlite", "humming", "marlin")
MODULES = ("gemlite", "humming", "humming.layer", "humming.forward", "humming.ops", "marlin_cuda", "marlin")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark as it is when started as a script, and no peer installed."""
    folder = str(Path(__file__).parents[2] / "benchmarks" / "kernels")
    monkeypatch.syspath_prepend(folder)
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    module = importlib.import_module("run")
    monkeypatch.setattr(sys.modules["peers"], "copies_needed", lambda bytes_: COPIES)
    yield module
    for name in ("run", "peers"):
        sys.modules.pop(name, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def dequantized(weight: PlainWeight) -> Tensor:
    centred = weight.integers.float() - 8
    return (centred * weight.scales.float().repeat_interleave(K // GROUPS, 1)).half()


class StandInGemlite:
    """`(integer - zero) * scale`, the integers transposed and the zero points folded into a product."""

    def __init__(self, W_nbits: int, **sizes: Any) -> None:
        assert W_nbits == 4
        assert sizes == {
            "group_size": K // GROUPS,
            "in_features": K,
            "out_features": N,
            "input_dtype": "FP16",
            "output_dtype": "FP16",
        }

    def pack(self, W_q: Tensor, scales: Tensor, zeros: Tensor, bias: None) -> None:
        assert W_q.dtype == torch.uint8
        assert zeros.shape == scales.shape == (N, GROUPS)
        self.tensors = [W_q.t().contiguous(), scales.t().contiguous(), (-zeros * scales).t().contiguous()]

    def get_tensor_args(self) -> list[Tensor]:
        return self.tensors

    def get_meta_args(self) -> list[int]:
        return [K // GROUPS]


def gemlite_forward(x: Tensor, bias: None, tensor_args: list[Tensor], meta_args: list[int]) -> Tensor:
    integers, scales, offsets = (tensor.float() for tensor in tensor_args)
    group = meta_args[0]
    return x.float() @ (integers * scales.repeat_interleave(group, 0) + offsets.repeat_interleave(group, 0))


class StandInHumming(torch.nn.Module):
    """Eight integers of a row to a word, the first in the lowest bits; no zero points means 8."""

    def __init__(self, *, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        super().__init__()
        assert weight_config == {"dtype": "uint4", "group_size": K // GROUPS, "scale_dtype": "float16"}
        self.weight = torch.nn.Parameter(torch.zeros(shape_n, shape_k // 8, dtype=torch.int32), requires_grad=False)
        scale = torch.zeros(shape_n, shape_k // weight_config["group_size"], dtype=torch_dtype)
        self.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        self.register_buffer("locks", torch.zeros(4, dtype=torch.int32))
        self.humming_config: str | None = None

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict(tensors, strict=False)

    def transform(self) -> None:
        self.humming_config = "ready"


def humming_pack(inputs: Tensor, num_bits: int) -> Tensor:
    assert (inputs.dtype, num_bits) == (torch.int32, 4)
    shifts = torch.arange(8, dtype=torch.int32) * 4
    return (inputs.view(inputs.shape[0], -1, 8) << shifts).sum(-1).to(torch.int32)


def humming_forward(config: str, inputs: Tensor, weight: Tensor, weight_scale: Tensor, locks: Tensor) -> Tensor:
    assert config == "ready"
    integers = (weight[..., None] >> (torch.arange(8, dtype=torch.int32) * 4) & 15).view(weight.shape[0], -1) - 8
    return inputs.float() @ (integers * weight_scale.float().repeat_interleave(K // GROUPS, 1)).t()


class StandInMarlin(torch.nn.Module):
    """A float16 linear layer and its scales, from which the integers are found again."""

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int) -> None:
        super().__init__()
        if infeatures % 128 or outfeatures % 256:
            raise ValueError("`infeatures` must be divisible by 128 and `outfeatures` by 256.")
        self.groupsize = groupsize
        self.register_buffer("B", torch.zeros(outfeatures, infeatures))
        self.register_buffer("s", torch.zeros(outfeatures, infeatures // groupsize))

    def pack(self, linear: torch.nn.Linear, scales: Tensor) -> None:
        assert linear.weight.dtype == torch.half
        self.s = scales.float().repeat_interleave(self.groupsize, 1)
        self.B = torch.round(linear.weight.data.float() / self.s)

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ (self.B * self.s).t()


def install_all(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        "gemlite",
        DType=SimpleNamespace(FP16="FP16"),
        GemLiteLinear=StandInGemlite,
        forward_functional=gemlite_forward,
        __version__="9.9",
    )
    layer = install(monkeypatch, "humming.layer", HummingLayer=StandInHumming)
    forward = install(monkeypatch, "humming.forward", humming_forward=humming_forward)
    ops = install(monkeypatch, "humming.ops", pack_weight=humming_pack)
    install(monkeypatch, "humming", layer=layer, forward=forward, ops=ops, __path__=[])
    install(monkeypatch, "marlin_cuda")
    install(monkeypatch, "marlin", Layer=StandInMarlin)


def test_every_provider_is_listed(run: Any) -> None:
    assert tuple(run.PROVIDERS) == ("ours", "cublas", "tinygemm", *PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_with_our_integers_and_every_copy_has_its_own_weight(
    run: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_all(monkeypatch)
    plain, x = plain_weight(N, K, GROUPS), activations(3, K)
    weight = dequantized(plain)
    calls = run.PROVIDERS[name](plain.integers, plain.scales, weight)
    truth = x.double() @ weight.double().T
    assert len(calls) == COPIES
    assert all(run.verify.relative_error(call(x), truth) < 1e-3 for call in calls)
    held = [call.B if name == "marlin" else held_by(call.keywords) for call in calls]
    assert len({tensor.data_ptr() for tensor in held}) == COPIES


def held_by(keywords: dict[str, Any]) -> Tensor:
    held = keywords["weight"] if "weight" in keywords else keywords["tensor_args"][0]
    assert isinstance(held, Tensor)
    return held


def test_a_missing_package_is_named_and_the_others_still_run(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_all(monkeypatch)
    monkeypatch.setitem(sys.modules, "marlin_cuda", None)
    assert tuple(run.available()) == ("ours", "cublas", "tinygemm", "gemlite", "humming")
    assert capsys.readouterr().err == "       marlin is left out: there is no package marlin_cuda\n"


def test_a_package_that_fails_while_it_is_imported_is_left_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(sys.modules["peers"], "import_module", fail)
    reason = run.why_missing(run.PEERS["gemlite"])
    assert reason == "gemlite cannot be imported: Torch not compiled with CUDA enabled"


def test_the_version_is_of_the_package_where_pip_does_not_know_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install_all(monkeypatch)
    assert run.version_of(run.PEERS["gemlite"]._replace(distribution="no-such-distribution")) == "9.9"
    assert run.version_of(run.PEERS["marlin"]._replace(distribution="no-such-distribution")) is None


def test_a_peer_that_refuses_a_shape_is_left_out_with_its_message(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_all(monkeypatch)
    plain = plain_weight(N // 2, K, GROUPS)
    arguments = (plain.integers, plain.scales, dequantized(plain))
    assert run.calls_of("marlin", run.PROVIDERS["marlin"], *arguments) == []
    assert "marlin cannot pack (128, 512): ValueError" in capsys.readouterr().err
    assert run.time_provider("marlin", [], arguments[2], 1) is None
    with pytest.raises(ValueError, match="must be divisible"):
        run.calls_of("ours", run.PROVIDERS["marlin"], *arguments)


def test_only_right_results_are_timed_and_a_wrong_peer_does_not_end_the_run(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    time = timing.Microseconds(1.0, 2.0, 3.0)
    monkeypatch.setattr(run, "time_calls", lambda calls: time)
    weight = dequantized(plain_weight(N, K, GROUPS))

    def right(x: Tensor) -> Tensor:
        return x.float() @ weight.float().T

    def wrong(x: Tensor) -> Tensor:
        return right(x) * torch.nan

    def fails(x: Tensor) -> Tensor:
        raise TypeError("no such argument")

    assert run.time_provider("gemlite", [right], weight, 2) == time
    for call, message in ((wrong, "gemlite is wrong: relative error nan at M = 2"), (fails, "no such argument")):
        calls: list[Callable[[Tensor], Tensor]] = [call]
        assert run.time_provider("gemlite", calls, weight, 2) is None
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="ours is wrong: relative error nan at M = 2"):
        run.time_provider("ours", [wrong], weight, 2)
