"""Torch's 4-bit CPU operator against its bfloat16 matmul: from how many tokens on is the cached weight faster?

    .venv/bin/python benchmarks/kernels/cpu.py --write

Prints one row per shape and number of tokens; `--write` keeps the rows in `benchmarks/results/cpu/int4_matmul.jsonl`
and the thresholds that follow from them in `quant_fairness_kernels/configs/cpu.json`. Correctness is checked first.
Times are of one thread: the smallest CPU time of a call, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quant_fairness_kernels.cpu_matmul import cpu_matmul, prepare_cpu
from quant_fairness_kernels.naive import naive_dequantize, naive_matmul
from quant_fairness_kernels.nibble_planes import pack_planes
from quant_fairness_kernels.verify import TOLERANCE, relative_error
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "int4_matmul.jsonl"
TABLE = ROOT / "kernels" / "quant_fairness_kernels" / "configs" / "cpu.json"
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096))
TOKENS = (1, 2, 4, 8, 16, 32)
MARGIN = 1.1
"""A threshold wants the operator this much faster, so that another machine or moment does not turn it round."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.25, help="CPU time per measurement (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the rows and write the thresholds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for N, K in SHAPES for row in measure_shape(N, K, seconds=arguments.seconds)]
    if arguments.write:
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        TABLE.write_text(json.dumps(thresholds(rows), indent=1) + "\n", encoding="utf-8")
    return 0


def measure_shape(N: int, K: int, *, seconds: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(N, K // 128, generator=generator) * 0.02 + 1e-3).to(torch.bfloat16)
    zeros = torch.full((N, K // 128), 8, dtype=torch.uint8)
    weight = prepare_cpu(pack_planes(integers, scales, zeros), rows=max(TOKENS))
    dense = weight.dense
    assert dense is not None  # kept by default
    rows = []
    for M in TOKENS:
        x = torch.randn(M, K, generator=generator).to(torch.bfloat16)
        if M <= 2:
            error = relative_error(cpu_matmul(x, weight), naive_matmul(x, naive_dequantize(integers, scales, zeros)))
            if not error <= TOLERANCE[torch.bfloat16]:
                raise SystemExit(f"the operator is wrong at {M} x {N} x {K}: relative error {error:.2e}")
        int4, bfloat16 = timed_pair(
            lambda x=x: cpu_matmul(x, weight), lambda x=x: torch.nn.functional.linear(x, dense), seconds=seconds
        )
        rows.append(row(M, N, K, int4, bfloat16))
        sys.stdout.write(
            f"{N:6d} x {K:6d}  M {M:3d}  int4 {int4:9.0f} us  bf16 {bfloat16:9.0f} us  {bfloat16 / int4:.2f}x\n"
        )
        sys.stdout.flush()
    return rows


def timed_pair(one: Callable[[], Tensor], other: Callable[[], Tensor], *, seconds: float) -> tuple[float, float]:
    """The smallest CPU microseconds of a call of each, taken in turns."""
    best = [float("inf"), float("inf")]
    for call in (one, other):
        call()
    spent = 0.0
    while spent < 2 * seconds:
        for place, call in enumerate((one, other)):
            start = time.thread_time()
            call()
            taken = time.thread_time() - start
            best[place] = min(best[place], taken)
            spent += taken
    return best[0] * 1e6, best[1] * 1e6


def row(M: int, N: int, K: int, int4: float, bfloat16: float) -> dict[str, Any]:
    return {
        "benchmark": "int4_matmul_cpu",
        "M": M,
        "N": N,
        "K": K,
        "group": 128,
        "int4_microseconds": round(int4, 1),
        "bfloat16_microseconds": round(bfloat16, 1),
        "timer": "smallest CPU time of a call, one thread",
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": machine(),
        "seed": 0,
        "command": "python benchmarks/kernels/cpu.py --write",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> str:
    """The processor and the instruction sets that decide here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in ("avx512_bf16", "avx512_vnni", "amx_bf16") if flag in text]
    return ", ".join([model or platform.processor() or platform.machine(), *flags])


def thresholds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per shape, the most tokens up to which the operator was faster by the margin at every measured number."""
    entries = []
    for N, K in SHAPES:
        largest = 0
        for one in (row for row in rows if (row["N"], row["K"]) == (N, K)):
            if one["bfloat16_microseconds"] < MARGIN * one["int4_microseconds"]:
                break
            largest = one["M"]
        entries.append({"N": N, "K": K, "rows": largest})
    return {
        "schema_version": 1,
        "source": "benchmarks/results/cpu/int4_matmul.jsonl",
        "capability": rows[0]["capability"],
        "entries": entries,
    }


if __name__ == "__main__":
    raise SystemExit(main())
