"""Our INT4 matmul beside cuBLAS, torch's own 4-bit kernel and the `peers` that are installed: checked, then timed.

    python benchmarks/kernels/run.py --out benchmarks/results/h200/int4_matmul.jsonl     on an NVIDIA GPU
    python benchmarks/kernels/run.py --interpret [--full]     correctness without a GPU, by triton's interpreter
    python benchmarks/kernels/run.py --sass [--full]          machine code without a GPU: instructions per weight

On a GPU the grid of `quant_fairness_kernels.verify` runs first, and nothing is timed if a case fails. Times are medians
of CUDA graph replays over at least 240 MB of rotated weights. `roofline` is the least time that memory or tensor cores
allow, from a copy and a matmul measured in the same run, over the time. Without a GPU there are no times: none is
predicted here. A call comes before every timing, so what a provider compiles or searches is not part of its time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Provider, version_of, why_missing
from quant_fairness_kernels import sass, verify
from quant_fairness_kernels.launch import Mixed, gpu_of, missing_for_triton, triton_matmul
from quant_fairness_kernels.nibble_planes import pack_planes
from quant_fairness_kernels.timing import Microseconds, copies_needed, time_calls
from quant_fairness_kernels.tune import LLAMA_8B, copy_of
from torch import Tensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
GROUP = 128
INT4_BYTES = 0.5 + 2 / GROUP
"""Per weight: the integer and its share of a 16-bit scale."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--interpret", action="store_true", help="check every kernel on a CPU")
    how.add_argument("--sass", action="store_true", help="compile for sm_80 and sm_90 and read the machine code")
    parser.add_argument("--full", action="store_true", help="every case instead of a small grid (minutes)")
    parser.add_argument("--out", type=Path, help="append the rows of a GPU run to this file")
    arguments = parser.parse_args()
    size = "full" if arguments.full else "small"
    if arguments.interpret:
        return check(size, {"TRITON_INTERPRET": "1"})
    if arguments.sass:
        return read_machine_code(size)
    if not torch.cuda.is_available():
        parser.error("timing needs an NVIDIA GPU; without one use --interpret or --sass")
    missing = missing_for_triton(torch.device("cuda"))
    if missing is not None:
        parser.error(f"the Triton kernels cannot run: {missing}")
    if check(size, {}):
        return 1
    for row in time_shapes():  # written one by one: what a peer does to the GPU must not cost the rows before it
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


def check(size: str, environment: dict[str, str]) -> int:
    """Run the grid in a process of its own (triton decides at import whether it interprets) and print it."""
    command = [sys.executable, "-m", "quant_fairness_kernels.verify", "--grid", size]
    failed = total = 0
    print("      error      tolerance  two runs    case: tokens x features x channels, and what is in it")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        assert process.stdout is not None  # asked for
        for line in process.stdout:
            row = json.loads(line)
            total, failed = total + 1, failed + (not row["passed"])
            bits = "repeatable" if row["repeatable"] else "DIFFERENT BITS"
            verdict = "ok" if row["passed"] else "WRONG"
            print(f"{verdict:5s} {row['error']:.1e} <= {row['tolerance']:.0e}  {bits}  {row['name']}", flush=True)
    print(f"{total - failed} of {total} cases right")
    return int(failed > 0 or process.returncode != 0)


def read_machine_code(size: str) -> int:
    """Compile the default configurations and print what their main loops cost; 1 if one is over its bound or spills."""
    print(f"{'':48s} {'per weight (bound)':18s} {'registers':>9s} {'spilled':>7s} {'shared':>6s} {'tensor':>6s} waited")
    failed, chosen = 0, sass.cases("full" if size == "full" else "small")
    for case in chosen:
        report, bound = sass.inspect(case), sass.most_instructions(case)
        bad = report.instructions_per_weight > bound or report.spilled_bytes > 0 or report.waited_loads > 0
        bad = bad or not report.tensor_core or report.int_to_float > 0 or not report.wide_copies
        failed += bad
        print(
            f"{'BAD' if bad else 'ok':3s} {case.name:44s} {report.instructions_per_weight:10.2f} ({bound:.1f})  "
            f"{report.registers:9d} {report.spilled_bytes:7d} {report.shared_bytes // 1024:3d} KB "
            f"{report.tensor_core:6d} {report.waited_loads:6d}",
            flush=True,
        )
    print(f"{len(chosen) - failed} of {len(chosen)} kernels within their bounds, on {triton_versions()}")
    return int(failed > 0)


def triton_versions() -> str:
    return f"triton {package_version('triton')}, torch {package_version('torch')}"


def time_shapes() -> Iterator[dict[str, Any]]:
    """One row per shape, number of tokens and provider."""
    providers, bandwidth, flops = available(), measured_bandwidth(), measured_flops()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, matmul {flops / 1e12:.0f} TFLOP/s")
    for N, K in LLAMA_8B:
        generator = torch.Generator().manual_seed(0)
        integers = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
        scales = (torch.rand(N, K // GROUP, generator=generator) * 0.02 + 1e-3).half()
        weight = ((integers.float() - 8) * scales.float().repeat_interleave(GROUP, 1)).half().cuda()
        calls = {name: calls_of(name, provider, integers, scales, weight) for name, provider in providers.items()}
        for M in TOKENS:
            ideal = max((INT4_BYTES * N * K + 2 * M * (N + K)) / bandwidth, 2 * M * N * K / flops) * 1e6
            times = {name: time_provider(name, copies, weight, M) for name, copies in calls.items()}
            for name, time in times.items():
                if time is None:
                    continue
                base = times["cublas"]
                assert base is not None  # takes every shape
                ratio = base.p50 / time.p50
                yield timed_row(name, M, N, K, time, ideal, ratio)
                print(
                    f"{N:6d} x {K:6d}  M {M:4d}  {name:10s} {time.p50:8.2f} us  {ideal / time.p50:5.0%}  {ratio:.2f}x"
                )


def available() -> dict[str, Provider]:
    """`PROVIDERS` without the peers that cannot be imported here; each of those is named on stderr."""
    reasons = {name: why_missing(peer) for name, peer in PEERS.items()}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"       {name} is left out: {reason}", file=sys.stderr)
    return {name: provider for name, provider in PROVIDERS.items() if reasons.get(name) is None}


def refusals(name: str) -> tuple[type[Exception], ...]:
    """Errors by which a provider says that it does not take a shape; a peer's may be of any kind."""
    return (Exception,) if name in PEERS else (RuntimeError, AttributeError)


def calls_of(
    name: str, provider: Provider, integers: Tensor, scales: Tensor, weight: Tensor
) -> list[Callable[[Tensor], Tensor]]:
    """The calls of a provider; none where it does not take the weight."""
    try:
        return provider(integers, scales, weight)
    except refusals(name) as error:
        print(f"       {name} cannot pack {tuple(weight.shape)}: {error!r}", file=sys.stderr)
        return []


def time_provider(
    name: str, calls: Sequence[Callable[[Tensor], Tensor]], weight: Tensor, M: int
) -> Microseconds | None:
    """Times of one provider; None where it does not take the shape. Wrong results of ours, or of torch, end the run."""
    if not calls:
        return None
    x = torch.randn(M, weight.shape[1], generator=torch.Generator().manual_seed(M)).half().to(weight.device)
    try:
        error = verify.relative_error(calls[0](x), x.double() @ weight.double().T)
        if error <= verify.TOLERANCE[torch.bfloat16]:  # tinygemm computes in bfloat16
            return time_calls([partial(call, x) for call in calls])
    except refusals(name) as reason:
        print(f"       {name} cannot run at M = {M}: {reason!r}", file=sys.stderr)
        return None
    wrong = f"{name} is wrong: relative error {error:.1e} at M = {M}"
    if name not in PEERS:
        raise SystemExit(wrong)
    print(f"       {wrong}; not timed", file=sys.stderr)
    return None


def ours(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    first = pack_planes(integers, scales, torch.full(scales.shape, 8, dtype=torch.uint8)).to("cuda")
    copies = [first, *(copy_of(first) for _ in range(copies_needed(weight.numel() // 2) - 1))]
    return [partial(triton_matmul, planes=planes, mixed=Mixed()) for planes in copies]


def cublas(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    copies = [weight, *(weight.clone() for _ in range(copies_needed(2 * weight.numel()) - 1))]
    return [partial(torch.nn.functional.linear, weight=copy) for copy in copies]


def tinygemm(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """`aten::_weight_int4pack_mm`, which takes bfloat16 only: the conversion of x is part of its time."""
    values = integers.to("cuda", torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack((values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8), 8)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1).to("cuda", torch.bfloat16).contiguous()
    copies = [packed, *(packed.clone() for _ in range(copies_needed(weight.numel() // 2) - 1))]

    def call(copy: Tensor, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm(x.to(torch.bfloat16), copy, GROUP, pairs)
        return result

    return [partial(call, copy) for copy in copies]


PROVIDERS: dict[str, Provider] = {"ours": ours, "cublas": cublas, "tinygemm": tinygemm} | {
    name: peer.provider for name, peer in PEERS.items()
}


def measured_bandwidth() -> float:
    """Bytes per second, read and written, of copying a gigabyte."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_calls([lambda: target.copy_(source)]).p50 * 1e-6)


def measured_flops() -> float:
    """Operations per second of a large square float16 matmul."""
    size = 8192
    a = torch.randn(size, size, device="cuda").half()
    return 2 * size**3 / (time_calls([lambda: a @ a]).p50 * 1e-6)


def timed_row(name: str, M: int, N: int, K: int, time: Microseconds, ideal: float, ratio: float) -> dict[str, Any]:
    import triton

    version = version_of(PEERS[name]) if name in PEERS else None
    return {
        "benchmark": "int4_matmul",
        "provider": name,
        **({} if version is None else {"provider_version": version}),
        "M": M,
        "N": N,
        "K": K,
        "group": GROUP,
        "microseconds": time._asdict(),
        "roofline": ideal / time.p50,
        "over_cublas": ratio,
        "gpu": gpu_of(torch.device("cuda", torch.cuda.current_device())).name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seed": 0,
        "command": "python benchmarks/kernels/run.py",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
