"""Which kernel runs, in which type: what was asked for, or a line that says what is missing."""

from __future__ import annotations

import pytest
import torch

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.serve import kernels
from quant_fairness_plugin.serve.kernels import Choice, choose_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the kernels run on, as far as the choice asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "missing_for_triton", lambda device: None if device.type == "cuda" else "no GPU")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        ("auto", None, Choice("cpu", torch.bfloat16, CPU)),
        ("auto", torch.float16, Choice("cpu", torch.float16, CPU)),
        ("auto", torch.float32, Choice("reference", torch.float32, CPU)),
        ("cpu", None, Choice("cpu", torch.bfloat16, CPU)),
        ("cpu", torch.float32, Choice("cpu", torch.float32, CPU)),
        ("reference", None, Choice("reference", torch.float32, CPU)),
    ],
)
def test_without_a_gpu(kernel: str, dtype: torch.dtype | None, expected: Choice) -> None:
    assert choose_kernel(kernel, dtype) == expected


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("kernel", "dtype", "expected"),
    [
        ("auto", None, Choice("triton", None, CUDA)),
        ("triton", torch.bfloat16, Choice("triton", torch.bfloat16, CUDA)),
        ("auto", torch.float32, Choice("reference", torch.float32, CPU)),
        ("cpu", None, Choice("cpu", torch.bfloat16, CPU)),
    ],
)
def test_with_a_gpu(kernel: str, dtype: torch.dtype | None, expected: Choice) -> None:
    assert choose_kernel(kernel, dtype) == expected


@pytest.mark.usefixtures("gpu")
def test_a_model_in_memory_stays_where_it_is() -> None:
    assert choose_kernel("auto", torch.float16, device=CUDA) == Choice("triton", torch.float16, CUDA)
    assert choose_kernel("auto", torch.float32, device=CPU) == Choice("cpu", torch.float32, CPU)
    with pytest.raises(ConfigError, match="kernel 'cpu' runs on the CPU, and the model is on cuda"):
        choose_kernel("cpu", torch.float16, device=CUDA)
    with pytest.raises(ConfigError, match="'triton' computes in float16 or bfloat16, not in float32"):
        choose_kernel("auto", torch.float32, device=CUDA)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("kernel", "dtype", "message"),
    [
        ("fast", None, "unknown kernel 'fast'; accepted are auto, triton, cpu, reference"),
        ("cpu", torch.int8, r"dtype torch\.int8 is not computed in; accepted are float16, bfloat16 and float32"),
        ("reference", torch.bfloat16, r"'reference' computes in float32, not in torch\.bfloat16"),
        ("triton", None, "kernel 'triton' cannot run: they run on an NVIDIA GPU.*sees no CUDA device here"),
    ],
)
def test_what_cannot_be_had_is_refused(kernel: str, dtype: torch.dtype | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_kernel(kernel, dtype)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_kernels.launch.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kernel 'triton' cannot run: triton is not installed: pip install"):
        choose_kernel("triton")
