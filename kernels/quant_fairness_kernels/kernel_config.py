"""Which tile, how many splits of K, which form: configurations are data, chosen on the host before the launch.

`configs/<gpu>.json`, written by `python -m quant_fairness_kernels.tune` on such a GPU, holds what was fastest for each
weight shape and range of M. For a GPU or a shape without an entry `default_config` decides from the size of the GPU;
nothing is ever timed while a model runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from quant_fairness_kernels.nibble_planes import BLOCK, COUNTERS, FEATURES

SCHEMA_VERSION = 1
M_RANGES = (16, 32, 64, 128, 256, 512, 1024, 1536)
"""Upper ends of the ranges of M that share a configuration."""
DEQUANTIZE_ABOVE = 1536
"""Tokens above which writing the weight out in 16 bit and calling cuBLAS costs less than taking planes apart in every
tile of tokens: the fused kernel's loop issues about 3 instructions per weight and 128 tokens, cuBLAS none."""
LEAST_BLOCKS = 4
"""Blocks of K that a split must have: fewer do not fill the asynchronous pipeline."""
MOST_SPLITS = 16
PROGRAMS_PER_MULTIPROCESSOR = 3
"""Programs of four warps that a multiprocessor holds at 128 to 168 registers a thread."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """One way to launch the kernel; see `triton_kernels.matmul` for what the fields do."""

    block_m: int
    block_n: int
    split_k: int
    warps: int
    stages: int
    transposed: bool
    scale_after: bool

    def tiles(self, M: int, N: int, D: int) -> tuple[int, int]:
        """Tiles of tokens, and of features: 4-bit ones, then 16-bit ones."""
        return -(-M // self.block_m), -(-N // self.block_n) + -(-D // self.block_n)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the choice depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


def choose_config(gpu: Gpu, *, M: int, N: int, K: int, group: int, D: int = 0) -> KernelConfig:
    """The tuned configuration of this GPU, shape and range of M if there is one, else `default_config`.

    Args:
        gpu: where the kernel will run.
        M: tokens, at least 1.
        N: 4-bit features.
        K: input channels.
        group: channels per scale, 0 for one scale per feature.
        D: 16-bit features.
    """
    tuned = tuned_configs(config_name(gpu.name)).get((N, K, group, m_range(M)))
    if tuned is None:
        return default_config(gpu, M=M, N=N, K=K, group=group, D=D)
    usable = fits(tuned, M=M, N=N, K=K, D=D)
    return tuned if usable else default_config(gpu, M=M, N=N, K=K, group=group, D=D)


def default_config(gpu: Gpu, *, M: int, N: int, K: int, group: int, D: int = 0) -> KernelConfig:
    """A configuration from the sizes alone: the smallest tile that holds M, and splits of K until the GPU is full.

    The form follows from instruction counts (`benchmarks/kernels/run.py --sass`): where tensor cores read the left
    operand from registers (sm_90) the transposed form wins from 17 tokens, elsewhere only for the largest tile. Scaling
    afterwards is exact; it is given up where its second set of accumulators would spill or cost more.
    """
    hopper = gpu.capability >= (9, 0)
    wide = -(-N // FEATURES) % 2 == 0
    if M <= 16:
        shape = KernelConfig(16, 128, 1, 4, 4, transposed=False, scale_after=True)
    elif M <= 32:
        shape = KernelConfig(32, 128, 1, 4, 4, transposed=hopper, scale_after=True)
    elif M <= 64 and not hopper and group in (32, 64):
        shape = KernelConfig(64, 128, 1, 8, 3, transposed=True, scale_after=False)  # four warps spill
    elif M <= 64:
        shape = KernelConfig(64, 128, 1, 4, 3, transposed=hopper, scale_after=not hopper)
    elif hopper and wide:
        shape = KernelConfig(128, 256, 1, 8, 3, transposed=True, scale_after=False)
    else:
        shape = KernelConfig(128, 128, 1, 8, 3, transposed=True, scale_after=False)
    return _split(shape, gpu, M=M, N=N, K=K, D=D)


def fits(config: KernelConfig, *, M: int, N: int, K: int, D: int) -> bool:
    """Whether the kernel may be launched so: tiles inside the padding, counters for every tile, a block per split."""
    padded = -(-N // FEATURES) * FEATURES
    tiles_m, tiles_n = config.tiles(M, N, D)
    return (
        padded % config.block_n == 0
        and config.split_k <= max(1, -(-K // BLOCK))
        and (config.split_k == 1 or tiles_m * tiles_n <= COUNTERS)
    )


def m_range(M: int) -> int:
    """The upper end of the range of M that a configuration is for; the last one has no end."""
    return next((end for end in M_RANGES if end >= M), M_RANGES[-1])


def config_name(gpu_name: str) -> str:
    """The name of a GPU as a file name: `NVIDIA H200` gives `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower().removeprefix("nvidia")).strip("-")


@cache
def tuned_configs(name: str) -> dict[tuple[int, int, int, int], KernelConfig]:
    """The configurations of `configs/<name>.json` by N, K, group and range of M; empty if there is no such file.

    Raises:
        ValueError: the file has another schema version.
    """
    path = files("quant_fairness_kernels") / "configs" / f"{name}.json"
    return parse_configs(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parse_configs(text: str) -> dict[tuple[int, int, int, int], KernelConfig]:
    """The entries of one configuration file.

    Raises:
        ValueError: another schema version.
    """
    document = json.loads(text)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"kernel configurations of version {document.get('schema_version')}; known: {SCHEMA_VERSION}")
    return {
        (entry["N"], entry["K"], entry["group"], entry["M"]): KernelConfig(**entry["config"])
        for entry in document["entries"]
    }


def write_configs(
    gpu: Gpu, entries: dict[tuple[int, int, int, int], tuple[KernelConfig, float]], versions: dict[str, str]
) -> str:
    """The text of a configuration file; each entry keeps the microseconds that it was chosen for."""
    rows: list[dict[str, Any]] = [
        {"N": N, "K": K, "group": group, "M": M, "config": asdict(config), "microseconds": round(microseconds, 3)}
        for (N, K, group, M), (config, microseconds) in sorted(entries.items())
    ]
    document = {"schema_version": SCHEMA_VERSION, "gpu": asdict(gpu), "versions": versions, "entries": rows}
    return json.dumps(document, indent=1) + "\n"


def _split(shape: KernelConfig, gpu: Gpu, *, M: int, N: int, K: int, D: int) -> KernelConfig:
    """`shape` with the largest power of two of splits for which all programs still run at once."""
    tiles_m, tiles_n = shape.tiles(M, N, D)
    slots = gpu.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR * 4 // shape.warps
    blocks = -(-K // BLOCK)
    splits = 1
    while (
        2 * splits <= MOST_SPLITS
        and tiles_m * tiles_n * 2 * splits <= min(slots, 2 * splits * COUNTERS)
        and blocks >= 2 * splits * LEAST_BLOCKS
    ):
        splits *= 2
    return KernelConfig(
        shape.block_m, shape.block_n, splits, shape.warps, shape.stages, shape.transposed, shape.scale_after
    )
