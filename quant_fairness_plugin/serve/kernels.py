"""Choose the kernel, the dtype and the device of a served model, before anything is read."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from quant_fairness_kernels.launch import interpreted, missing_for_triton

from quant_fairness_plugin.errors import ConfigError

Kernel = Literal["auto", "triton", "cpu", "reference"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Choice(NamedTuple):
    """A kernel that runs here."""

    kernel: Literal["triton", "cpu", "reference"]
    dtype: torch.dtype | None
    """Of activations and 16-bit modules; None for the one that the checkpoint is stored in."""
    device: torch.device


def choose_kernel(kernel: str, dtype: torch.dtype | None = None, *, device: torch.device | None = None) -> Choice:
    """Resolve the wanted kernel, dtype and device to those that this machine can use.

    `auto` is the Triton kernels on a GPU that they run on, the CPU path elsewhere, and the reference for float32. The
    CPU path takes bfloat16 unless told otherwise, because that is the only 16-bit type that CPUs multiply quickly.

    Args:
        kernel: `auto`, `triton`, `cpu` or `reference`.
        dtype: float16, bfloat16 or float32; None for the kernel's own choice.
        device: where the model is; None if that is to be chosen too.

    Raises:
        ConfigError: an unknown kernel or type, two that do not go together, or a kernel that cannot run here.
    """
    if kernel not in get_args(Kernel):
        raise ConfigError(f"unknown kernel {kernel!r}; accepted are {', '.join(get_args(Kernel))}. Use one of these.")
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype} is not computed in; accepted are float16, bfloat16 and float32. Use those.")
    if kernel == "auto":
        kernel = _fitting(dtype, device)
    if kernel == "triton":
        return _triton(dtype, device)
    if device is not None and device.type != "cpu":
        raise ConfigError(f"kernel {kernel!r} runs on the CPU, and the model is on {device}. Move it, or use 'triton'.")
    if kernel == "cpu":
        return Choice("cpu", dtype or torch.bfloat16, torch.device("cpu"))
    if dtype not in (None, torch.float32):
        raise ConfigError(f"kernel 'reference' computes in float32, not in {dtype}. Leave dtype out, or use 'cpu'.")
    return Choice("reference", torch.float32, torch.device("cpu"))


def _fitting(dtype: torch.dtype | None, device: torch.device | None) -> str:
    if device is not None:
        return "triton" if device.type != "cpu" else "cpu"
    if dtype == torch.float32:
        return "reference"
    on_a_gpu = torch.cuda.is_available() and missing_for_triton(torch.device("cuda")) is None
    return "triton" if on_a_gpu else "cpu"


def _triton(dtype: torch.dtype | None, device: torch.device | None) -> Choice:
    if dtype == torch.float32:
        raise ConfigError("kernel 'triton' computes in float16 or bfloat16, not in float32. Use 'reference'.")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() and not interpreted() else "cpu")
    missing = missing_for_triton(device)
    if missing is None:
        return Choice("triton", dtype, device)
    why = "" if torch.cuda.is_available() else f"; torch {torch.__version__} sees no CUDA device here"
    raise ConfigError(f"kernel 'triton' cannot run: {missing}{why}. Use kernel 'cpu', or 'auto'.")
