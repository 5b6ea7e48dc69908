"""Find the fastest configurations on the GPU at hand and write them as data.

    python -m quant_fairness_kernels.tune --shapes 4096x4096,28672x4096 --group 128 --output h200.json

Shapes are NxK. Every candidate is compared with the default configuration before it is timed, and one that is wrong,
or that the GPU has no room for, is left out. A file in `quant_fairness_kernels/configs` that is named as `config_name`
says is picked up.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from quant_fairness_kernels.kernel_config import (
    M_RANGES,
    MOST_SPLITS,
    Gpu,
    KernelConfig,
    config_name,
    default_config,
    fits,
    write_configs,
)
from quant_fairness_kernels.launch import Mixed, gpu_of, missing_for_triton, triton_matmul
from quant_fairness_kernels.nibble_planes import NibblePlanes, pack_planes
from quant_fairness_kernels.timing import copies_needed, time_calls
from quant_fairness_kernels.verify import TOLERANCE, relative_error

log = logging.getLogger(__name__)

Measure = Callable[[int, KernelConfig], float | None]
"""Microseconds of a configuration at M tokens; None where it cannot be used."""
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))


def candidates(gpu: Gpu, *, M: int, N: int, K: int, group: int) -> Iterator[KernelConfig]:
    """Configurations worth timing, the default first, none twice."""
    default = default_config(gpu, M=M, N=N, K=K, group=group)
    yield default
    block_m = min(128, max(16, 1 << (M - 1).bit_length()))
    sizes = {block_m, 64} if M > 64 else {block_m}
    splits = [split for split in (1, 2, 4, 8, 16) if split <= MOST_SPLITS]
    for block, block_n, warps, stages, transposed, after, split in product(
        sorted(sizes), (64, 128, 256), (2, 4, 8), (3, 4, 5), (False, True), (True, False), splits
    ):
        config = KernelConfig(block, block_n, split, warps, stages, transposed, after)
        # A warpgroup is four warps; more than 64 accumulators a thread for each of two tiles would spill.
        sensible = 16 <= block_n // warps <= 64 and (not transposed or warps >= 4) and (not after or block <= 64)
        near = abs(split.bit_length() - default.split_k.bit_length()) <= 1
        if sensible and near and config != default and fits(config, M=M, N=N, K=K, D=0):
            yield config


def best_config(configs: Iterator[KernelConfig], M: int, measure: Measure) -> tuple[KernelConfig, float] | None:
    """The configuration with the smallest time; None if none could be used."""
    best: tuple[KernelConfig, float] | None = None
    for config in configs:
        microseconds = measure(M, config)
        if microseconds is not None and (best is None or microseconds < best[1]):
            best = config, microseconds
    return best


def tune(
    gpu: Gpu, shapes: Sequence[tuple[int, int]], group: int, measure_for: Callable[[int, int, int], Measure]
) -> dict[tuple[int, int, int, int], tuple[KernelConfig, float]]:
    """The best configuration for every shape and range of M, with its time."""
    entries = {}
    for N, K in shapes:
        measure = measure_for(N, K, group)
        for M in M_RANGES:
            best = best_config(candidates(gpu, M=M, N=N, K=K, group=group), M, measure)
            if best is None:
                raise RuntimeError(f"no configuration is right for {M} x {N} x {K}, group {group}")
            entries[N, K, group, M] = best
            log.info("%d x %d x %d: %.2f us with %s", M, N, K, best[1], best[0])
    return entries


def gpu_measure(N: int, K: int, group: int) -> Measure:
    """A measurement on the GPU at hand, on random symmetric weights that its cache cannot hold."""
    generator = torch.Generator().manual_seed(0)
    groups = 1 if group == 0 else K // group
    integers = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(N, groups, generator=generator) * 0.02 + 1e-3).half()
    first = pack_planes(integers, scales, torch.full((N, groups), 8, dtype=torch.uint8)).to("cuda")
    weights = [first, *(copy_of(first) for _ in range(copies_needed(N * K // 2) - 1))]

    def measure(M: int, config: KernelConfig) -> float | None:
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).half().cuda()
        truth = triton_matmul(x, first, Mixed(), default_config(gpu_of(x.device), M=M, N=N, K=K, group=group))
        try:
            got = triton_matmul(x, first, Mixed(), config)
        except RuntimeError as error:  # triton's OutOfResources, and what ptxas refuses, are RuntimeErrors
            log.info("%s cannot run: %s", config, error)
            return None
        if not relative_error(got, truth) <= TOLERANCE[torch.float16]:
            log.warning("%s is wrong and left out", config)
            return None
        return time_calls([partial(triton_matmul, x, weight, Mixed(), config) for weight in weights]).p50

    return measure


def copy_of(planes: NibblePlanes) -> NibblePlanes:
    """The same weight in other memory, with counters of its own."""
    return replace(planes, words=planes.words.clone(), scales=planes.scales.clone(), counters=planes.counters.clone())


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """`4096x4096,28672x4096` as pairs of N and K.

    Raises:
        ValueError: anything else.
    """
    shapes = []
    for part in text.split(","):
        sizes = part.strip().split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise ValueError(f"{part!r} is no shape; write NxK, as 4096x14336")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return tuple(shapes)


def main(arguments: list[str] | None = None) -> int:
    """Tune and write the file."""
    parser = argparse.ArgumentParser(prog="python -m quant_fairness_kernels.tune", description=__doc__)
    parser.add_argument("--shapes", type=parse_shapes, default=LLAMA_8B, help="NxK, by comma; default: Llama-8B's")
    parser.add_argument("--group", type=int, choices=(0, 32, 64, 128), default=128, help="0 is one scale per feature")
    parser.add_argument("--output", type=Path, help="default: <gpu>.json here")
    chosen = parser.parse_args(arguments)
    missing = missing_for_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if missing is not None or not torch.cuda.is_available():
        parser.error(f"tuning times kernels on an NVIDIA GPU: {missing or 'there is none'}")
    import triton

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    entries = tune(gpu, chosen.shapes, chosen.group, gpu_measure)
    path = chosen.output or Path(f"{config_name(gpu.name)}.json")
    text = write_configs(gpu, entries, {"torch": torch.__version__, "triton": triton.__version__})
    path.write_text(text, encoding="utf-8")
    log.info("wrote %s", path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
