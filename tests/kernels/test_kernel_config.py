"""The choice of a launch: every choice can be launched, tuned entries win, and the file keeps what was tuned."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
from quant_fairness_kernels import kernel_config
from quant_fairness_kernels.kernel_config import (
    M_RANGES,
    MOST_SPLITS,
    Gpu,
    KernelConfig,
    choose_config,
    config_name,
    default_config,
    fits,
    m_range,
    parse_configs,
    write_configs,
)

H200 = Gpu("NVIDIA H200", (9, 0), 132)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)
SIZES = ((1, 1), (100, 96), (4096, 4096), (14336, 4096), (4096, 14336), (128256, 4096), (131, 333))
ONE = KernelConfig(16, 64, 4, 2, 5, transposed=True, scale_after=True)


@pytest.mark.parametrize("gpu", [H200, A100])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_every_default_can_be_launched(gpu: Gpu, N: int, K: int) -> None:
    for M, group, D in product((1, 16, 17, 64, 65, 130, 1500), (0, 32, 128), (0, 70)):
        config = default_config(gpu, M=M, N=N, K=K, group=group, D=D)
        assert fits(config, M=M, N=N, K=K, D=D)
        assert config.block_m >= min(M, 128)
        assert 1 <= config.split_k <= MOST_SPLITS


def test_small_layers_are_split_until_the_gpu_is_full_and_large_ones_are_not() -> None:
    small = default_config(H200, M=1, N=4096, K=4096, group=128)
    assert small.split_k == 8
    assert small.split_k * 4096 // small.block_n > H200.multiprocessors
    assert default_config(H200, M=1, N=128256, K=4096, group=128).split_k == 1
    assert default_config(H200, M=1, N=256, K=512, group=128).split_k == 1


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({"block_n": 256}, {"N": 300}, "tile wider than the padding"),
        ({"split_k": 5}, {"K": 512}, "more splits than blocks"),
        ({"split_k": 2}, {"M": 20000, "N": 4096}, "more tiles than counters"),
    ],
)
def test_what_cannot_be_launched_does_not_fit(change: dict[str, int], sizes: dict[str, int], message: str) -> None:
    sizes = {"M": 1, "N": 256, "K": 1024, "D": 0} | sizes
    assert fits(replace(ONE, split_k=1), **sizes), message
    assert not fits(replace(ONE, **({"split_k": 1} | change)), **sizes), message


def test_a_tuned_entry_wins_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(4096, 4096, 128, 16): ONE, (4096, 512, 128, 16): replace(ONE, split_k=8)}
    monkeypatch.setattr(kernel_config, "tuned_configs", lambda name: table if name == "h200" else {})
    assert choose_config(H200, M=3, N=4096, K=4096, group=128) == ONE
    default = default_config(H200, M=3, N=4096, K=4096, group=64)
    assert default != ONE
    assert choose_config(H200, M=3, N=4096, K=4096, group=64) == default
    assert choose_config(A100, M=3, N=4096, K=4096, group=128) != ONE
    assert choose_config(H200, M=3, N=4096, K=512, group=128).split_k == 1


def test_a_configuration_file_comes_back_as_written() -> None:
    entries = {(4096, 4096, 128, 16): (ONE, 4.25), (100, 96, 32, 64): (replace(ONE, split_k=1), 1.0)}
    text = write_configs(H200, entries, {"triton": "3.9.0"})
    assert parse_configs(text) == {key: config for key, (config, _) in entries.items()}
    assert json.loads(text)["gpu"]["name"] == "NVIDIA H200"
    with pytest.raises(ValueError, match="version 2; known: 1"):
        parse_configs(text.replace('"schema_version": 1', '"schema_version": 2'))


def test_ranges_of_tokens_and_names_of_gpus() -> None:
    assert [m_range(M) for M in (1, 16, 17, 1536, 10**6)] == [16, 16, 32, 1536, M_RANGES[-1]]
    assert config_name("NVIDIA H200") == "h200"
    assert config_name("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_no_file_means_no_entries() -> None:
    assert kernel_config.tuned_configs("a-gpu-that-nobody-has") == {}
