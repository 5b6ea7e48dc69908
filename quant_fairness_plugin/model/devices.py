"""Where a model is computed, and in what: devices by name, and what `auto` comes to. Torch is imported when asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quant_fairness_plugin.errors import ConfigError

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16"]
AUTO = "auto"
ACCELERATORS = ("cuda", "mps", "xpu")
"""In the order in which `auto` takes them."""
_NAME = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", re.ASCII)
FASTER = 1.5
"""How much faster bfloat16 products must be than float32 ones, for what they round."""
PROBE_SIZE = 512
"""Rows and columns of the matrices that are multiplied: some milliseconds, and larger than what a call costs."""


@dataclass(frozen=True, slots=True)
class ByDevice:
    """A limit that is one number on a CPU, whose cache is to hold something, and another where launches cost more."""

    cpu: int
    accelerator: int

    def on(self, device_type: str) -> int:
        """Return the number for a type of device."""
        return self.cpu if device_type == "cpu" else self.accelerator


def check_device_name(name: str) -> None:
    """Refuse what no device is called, before torch is imported.

    Raises:
        ConfigError: another word, or a number where there is one device only.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:0, cuda:1, …, mps, xpu, xpu:0, …")


def present_devices() -> tuple[str, ...]:
    """Return the devices that this torch can use here, as `cuda:0`, in the order in which `auto` takes them."""
    import torch

    names = [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    names += ["mps"] if torch.backends.mps.is_available() else []
    names += [f"xpu:{index}" for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0)]
    return (*names, "cpu")


def find_device(name: str) -> str:
    """Return the device that a name means here: the first present one for `auto` and for a type without a number.

    Raises:
        ConfigError: it is not there; says what is.
    """
    check_device_name(name)
    present = present_devices()
    for device in present:
        if name in (AUTO, device, device.partition(":")[0]):
            return device
    raise ConfigError(
        f"device {name} is not here; torch finds {', '.join(present)}. Use one of these, or install a torch build for "
        f"{name.partition(':')[0]}"
    )


def devices_like(device: str) -> tuple[str, ...]:
    """Return every device of a device's type that is here, on which workers can compute side by side; at least it."""
    kind = device.partition(":")[0]
    return tuple(other for other in present_devices() if other.partition(":")[0] == kind) or (device,)


def find_dtype(
    name: Dtype, device: str, *, stored: str | None, faster: Callable[[], float] | None = None
) -> Literal["float32", "bfloat16"]:
    """Return what a model is computed in.

    `auto` is bfloat16 for weights that are stored in it, which it does not round, on an accelerator and on a CPU that
    multiplies in it faster; else float32.

    Args:
        name: what was asked for.
        device: where it is computed.
        stored: the dtype in which the weights are on disk, as `bfloat16`; None where files do not say.
        faster: times products; None is `speedup`.
    """
    if name == "float32" or name == "bfloat16":
        return name
    if stored != "bfloat16":
        return "float32"
    return "bfloat16" if device != "cpu" or (faster or speedup)() >= FASTER else "float32"


def speedup() -> float:
    """Return how many times faster products of matrices are in bfloat16 than in float32 on this CPU; 0 without AMX.

    Without AMX bfloat16 is converted and never wins, so that nothing is timed and no figure depends on the machine's
    load.
    """
    import torch

    if not torch.cpu._is_amx_tile_supported():
        return 0.0
    return _seconds(torch.float32) / _seconds(torch.bfloat16)


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time of one product among some, the first not counted."""
    import time

    import torch

    left, right = (torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over a vocabulary: float64, which MPS does not have."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def describe_device(device: torch.device) -> str:
    """Return a device as results name it: its type, and which one it is where torch tells."""
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"xpu ({torch.xpu.get_device_name(device)})" if device.type == "xpu" else device.type
