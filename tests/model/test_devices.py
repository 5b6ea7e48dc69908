"""Devices by name, what `auto` comes to, and workers side by side; no device but this CPU is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model import devices
from quant_fairness_plugin.model.devices import (
    FASTER,
    ByDevice,
    check_device_name,
    describe_device,
    devices_like,
    find_device,
    find_dtype,
    present_devices,
    wide_dtype,
)

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Say which devices there are."""

    def has(*names: str) -> None:
        monkeypatch.setattr(devices, "present_devices", lambda: (*names, "cpu"))

    return has


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:a", "cuda:-1", "cpu:0", "mps:0", "CUDA", "cuda:1 ", "cuda:١"])
def test_a_word_that_is_no_device_is_refused_before_torch(name: str) -> None:
    with pytest.raises(ConfigError, match="is unknown; use auto, cpu, cuda, cuda:0"):
        check_device_name(name)
    with pytest.raises(ConfigError, match="is unknown; use auto, cpu, cuda, cuda:0"):
        make_config(device=name)


def test_a_configuration_with_a_device_imports_no_torch() -> None:
    code = (
        "import sys; from quant_fairness_plugin.config import FairConfig; FairConfig(device='cuda:1', dtype='bfloat16')"
        "; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("present", "name", "device"),
    [
        ((), "auto", "cpu"),
        (("cuda:0", "cuda:1"), "auto", "cuda:0"),
        (("mps",), "auto", "mps"),
        (("xpu:0",), "auto", "xpu:0"),
        (("cuda:0", "mps", "xpu:0"), "auto", "cuda:0"),
        (("cuda:0", "cuda:1"), "cuda", "cuda:0"),
        (("cuda:0", "cuda:1"), "cuda:1", "cuda:1"),
        (("cuda:0", "cuda:1"), "cpu", "cpu"),
        (("mps",), "mps", "mps"),
    ],
)
def test_a_name_means_the_first_device_of_its_type(
    machine: Machine, present: Sequence[str], name: str, device: str
) -> None:
    machine(*present)
    assert find_device(name) == device


@pytest.mark.parametrize(("present", "name"), [((), "cuda"), (("cuda:0",), "cuda:1"), (("cuda:0",), "mps")])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    machine: Machine, present: Sequence[str], name: str
) -> None:
    machine(*present)
    with pytest.raises(
        ConfigError, match=f"device {name} is not here; torch finds {', '.join((*present, 'cpu'))}. Use"
    ):
        find_device(name)


def test_workers_compute_side_by_side_on_devices_of_one_type(machine: Machine) -> None:
    machine("cuda:0", "cuda:1", "xpu:0")
    assert devices_like("cuda:1") == ("cuda:0", "cuda:1")
    assert devices_like("cpu") == ("cpu",)
    assert devices_like("pretend:0") == ("pretend:0",)  # one that torch does not list


@pytest.mark.parametrize(
    ("name", "device", "stored", "faster", "dtype"),
    [
        ("float32", "cuda:0", "bfloat16", 8.0, "float32"),
        ("bfloat16", "cpu", "float16", 0.0, "bfloat16"),
        ("auto", "cpu", "bfloat16", FASTER, "bfloat16"),
        ("auto", "cpu", "bfloat16", 0.25, "float32"),
        ("auto", "cpu", "float16", 8.0, "float32"),
        ("auto", "cuda:0", "bfloat16", 0.0, "bfloat16"),
        ("auto", "cuda:0", "float16", 8.0, "float32"),
        ("auto", "mps", None, 8.0, "float32"),
    ],
)
def test_auto_is_bfloat16_only_where_it_is_faster_and_rounds_no_weight(
    name: devices.Dtype, device: str, stored: str | None, faster: float, dtype: str
) -> None:
    assert find_dtype(name, device, stored=stored, faster=lambda: faster) == dtype


def test_products_are_timed_only_where_the_processor_multiplies_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert devices.speedup() == 0.0
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(devices, "_seconds", lambda dtype: 3.0 if dtype == torch.float32 else 1.5)
    assert devices.speedup() == 2.0


def test_this_machine_has_a_cpu_and_says_so() -> None:
    assert present_devices()[-1] == find_device("cpu") == describe_device(torch.device("cpu")) == "cpu"
    assert FairConfig().device == FairConfig().dtype == "auto"


def test_limits_and_sums_by_device() -> None:
    limit = ByDevice(cpu=1, accelerator=2)
    assert [limit.on(kind) for kind in ("cpu", "cuda", "mps", "xpu", "pretend")] == [1, 2, 2, 2, 2]
    assert wide_dtype(torch.device("mps")) == torch.float32  # MPS has no float64
    assert wide_dtype(torch.device("cuda", 0)) == torch.float64
