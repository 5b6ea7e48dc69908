"""The tuner's choices with a made-up clock: it picks, skips and writes the right thing, and needs no GPU for that."""

from __future__ import annotations

import pytest
from quant_fairness_kernels import timing
from quant_fairness_kernels.kernel_config import (
    M_RANGES,
    Gpu,
    KernelConfig,
    default_config,
    fits,
    parse_configs,
    write_configs,
)
from quant_fairness_kernels.tune import best_config, candidates, main, parse_shapes, tune

H200 = Gpu("NVIDIA H200", (9, 0), 132)


@pytest.mark.parametrize("M", M_RANGES)
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (130, 256)])
def test_every_candidate_can_be_launched_and_none_comes_twice(M: int, N: int, K: int) -> None:
    configs = list(candidates(H200, M=M, N=N, K=K, group=128))
    assert configs[0] == default_config(H200, M=M, N=N, K=K, group=128)
    assert len(set(configs)) == len(configs) > 1
    assert all(fits(config, M=M, N=N, K=K, D=0) for config in configs)


def test_the_fastest_that_works_wins() -> None:
    configs = list(candidates(H200, M=16, N=4096, K=4096, group=128))[:4]
    times = dict(zip(configs, (5.0, None, 3.0, 4.0), strict=True))
    assert best_config(iter(configs), 16, lambda M, config: times[config]) == (configs[2], 3.0)
    assert best_config(iter(configs), 16, lambda M, config: None) is None


def test_tuned_entries_are_written_for_every_shape_and_range() -> None:
    def prefers_wide(N: int, K: int, group: int) -> object:
        return lambda M, config: 100.0 - config.block_n

    entries = tune(H200, [(4096, 4096), (256, 1024)], 64, prefers_wide)  # type: ignore[arg-type] # a stand-in clock
    assert set(entries) == {(N, K, 64, M) for N, K in ((4096, 4096), (256, 1024)) for M in M_RANGES}
    assert {config.block_n for config, _ in entries.values()} == {256}
    back = parse_configs(write_configs(H200, entries, {}))
    assert back == {key: config for key, (config, _) in entries.items()}
    assert all(isinstance(config, KernelConfig) for config in back.values())


def test_a_shape_that_nothing_can_compute_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no configuration is right for 16 x 256 x 256, group 128"):
        tune(H200, [(256, 256)], 128, lambda N, K, group: lambda M, config: None)


def test_shapes_are_parsed() -> None:
    assert parse_shapes("4096x4096, 28672x4096") == ((4096, 4096), (28672, 4096))
    for text in ("", "4096", "4096x", "0x5", "4096x4096x1", "-1x5", "axb"):
        with pytest.raises(ValueError, match="is no shape; write NxK"):
            parse_shapes(text)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "tuning times kernels on an NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="timing needs an NVIDIA GPU"):
        timing.time_calls([])


def test_small_weights_are_copied_until_the_cache_cannot_hold_them() -> None:
    assert timing.copies_needed(8 * 2**20) == 30
    assert timing.copies_needed(2**30) == 2
