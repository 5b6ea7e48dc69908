"""Machine code of the kernels without a GPU: compiled for sm_80 or sm_90 by the tools in triton's wheel, then read.

What binds a 4-bit matmul of few tokens on a large GPU is the number of instructions per weight, not only the bytes: an
H200 issues about 4.0 in the time in which its memory delivers one 4-bit weight (132 multiprocessors x 4 schedulers x 32
lanes x 1.98 GHz over 4.3 TB/s / 0.52 B). `inspect` counts them in the main loop, and sees what would spoil it: spilled
registers, integer-to-float conversions, narrow loads, loads that are waited for, no tensor cores.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from quant_fairness_kernels.kernel_config import Gpu, KernelConfig, default_config

LANES = 32
BLOCK_K = 128
ALIGNED = {"N", "K", "stride_x", "stride_permuted", "stride_words", "stride_scales", "stride_columns", "stride_dense"}
HOPPER = 90
GPUS = {80: Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108), HOPPER: Gpu("NVIDIA H200", (9, 0), 132)}

_MMA_SYNC = {32: 3.0, 64: 3.8, 128: 7.5}
_ARCHITECTURES: tuple[Literal[80, 90], ...] = (80, 90)
_Variant = tuple[Literal[0, 32, 64, 128], bool, Literal["float16", "bfloat16"]]


@dataclass(frozen=True, slots=True)
class SassCase:
    """One compilation of the matmul kernel."""

    architecture: Literal[80, 90]
    group: Literal[0, 32, 64, 128]
    symmetric: bool
    dtype: Literal["float16", "bfloat16"]
    config: KernelConfig
    columns: bool = False
    dense: bool = False
    silu_mul: bool = False

    @property
    def name(self) -> str:
        """All of it, for a table or a test's name."""
        extras = "".join(f"-{field.name}" for field in fields(self)[5:] if getattr(self, field.name))
        grid = "sym" if self.symmetric else "zeros"
        tile = f"{self.config.block_m}x{self.config.block_n}{'tr' if self.config.transposed else ''}"
        return f"sm{self.architecture}-{tile}-g{self.group}-{grid}-{self.dtype}{extras}"


@dataclass(frozen=True, slots=True)
class SassReport:
    """What the machine code holds. Counts are of one warp in one round of the main loop, unless said otherwise."""

    instructions_per_weight: float
    """Instructions that a lane issues in the loop, over the weights that it handles there."""
    registers: int
    spilled_bytes: int
    """Stack and local memory of a thread, and in the whole kernel, accesses to either count as one byte each."""
    shared_bytes: int
    tensor_core: int
    int_to_float: int
    wide_copies: int
    """Asynchronous copies of 16 bytes per thread, in the whole kernel."""
    waited_loads: int
    """Loads from global memory into registers inside the loop: nothing hides their latency."""


def cases(size: Literal["small", "full"]) -> list[SassCase]:
    """The default configurations of an A100 and an H200 for M = 16 to 128, in all groups and both types if `full`."""
    chosen: list[SassCase] = []
    for architecture in _ARCHITECTURES:
        for M in (16, 32, 64, 128):
            for group, symmetric, dtype in _variants(size, M):
                config = default_config(GPUS[architecture], M=M, N=4096, K=4096, group=group)
                chosen.append(SassCase(architecture, group, symmetric, dtype, config))
        if size == "full":
            config = default_config(GPUS[architecture], M=16, N=4096, K=4096, group=128)
            plain = SassCase(architecture, 128, False, "float16", config)
            chosen += [replace(plain, columns=True), replace(plain, dense=True), replace(plain, silu_mul=True)]
    return chosen


def most_instructions(case: SassCase) -> float:
    """The bound on instructions per weight that a case is held to.

    Up to 16 tokens 2.6, with groups of 64 or 32 channels 3.4 (two and four sums per block instead of one). Hopper's
    tensor cores take a whole tile per instruction, so up to 128 tokens 3.2 there. An A100's `mma.sync` takes 16
    by 8 by 16: tokens / 64 instructions per weight and operand loads besides, so its bound grows with the tile.
    At 64 tokens with small groups it takes eight warps not to spill, each with half the weights for its loads: 6.1.
    bfloat16 shifts three planes where float16 shifts one: 0.3 more, but for the smallest tile with large groups.
    """
    tokens, group = case.config.block_m, case.group
    shifts = 0.3 if case.dtype == "bfloat16" else 0.0
    if tokens <= 16:
        return 3.4 + shifts if group in (32, 64) else 2.6
    if case.architecture != HOPPER and tokens == 64 and group in (32, 64):
        return 6.1
    bound = 3.2 if case.architecture == HOPPER else _MMA_SYNC[tokens]
    return bound + shifts + {32: 1.3, 64: 0.6}.get(group, 0.0)


def inspect(case: SassCase) -> SassReport:
    """Compile one case and read its machine code.

    Raises:
        RuntimeError: triton was imported as an interpreter, which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant_fairness_kernels.triton_kernels.matmul import int4_matmul_kernel as kernel

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so triton interprets; unset it to compile")
    constants = _constants(case)
    signature = _signature(kernel.arg_names, constants, case.dtype)
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | ALIGNED | {"stride_out"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    # Fusing multiplies and adds is what the GPU run does by default today; a later triton changes the default.
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.architecture, LANES), options=options)
    return _read(compiled.asm["cubin"], case, int(compiled.metadata.shared))


def main_loop(listing: str) -> list[str]:
    """The instructions of the loop that takes planes apart: of all backward branches, the one around most `LOP3`."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", listing, re.M)
    place = {int(address, 16): index for index, (address, _, _) in enumerate(lines)}
    best: list[str] = []
    for index, (address, operation, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if operation.startswith("BRA") else None
        if target is None or int(target[1], 16) >= int(address, 16) or int(target[1], 16) not in place:
            continue
        body = [name for _, name, _ in lines[place[int(target[1], 16)] : index + 1]]
        if sum(name.startswith("LOP3") for name in body) > sum(name.startswith("LOP3") for name in best):
            best = body
    return best


def _variants(size: str, M: int) -> Iterator[_Variant]:
    if size == "small":
        if M > 16:
            yield 128, True, "float16"
        else:
            yield 32, False, "float16"
            yield 128, False, "bfloat16"
        return
    groups: tuple[Literal[0, 32, 64, 128], ...] = (128, 64, 32, 0)
    for group in groups:
        for symmetric in (True, False):
            yield group, symmetric, "float16"
            yield group, symmetric, "bfloat16"


def _constants(case: SassCase) -> dict[str, Any]:
    import triton.language as tl

    compute = tl.float16 if case.dtype == "float16" else tl.bfloat16
    return {
        "GROUP": case.group,
        "SYMMETRIC": case.symmetric,
        "EVEN_K": True,
        "HAS_COLUMNS": case.columns,
        "HAS_DENSE": case.dense,
        "HAS_BIAS": False,
        "SILU_MUL": case.silu_mul,
        "BLOCK_M": case.config.block_m,
        "BLOCK_N": case.config.block_n,
        "SPLIT_K": case.config.split_k,
        "TRANSPOSED": case.config.transposed,
        "SCALE_AFTER": case.config.scale_after,
        "STAGES": case.config.stages,
        "STORED": compute,
        "COMPUTE": compute,
        "ASM": True,
    }


def _signature(names: list[str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    special = {
        "words_ptr": "*i16",
        "scales_ptr": "*i32",
        "column_index_ptr": "*i32",
        "partials_ptr": "*fp32",
        "counters_ptr": "*i32",
    }
    number = "*fp16" if dtype == "float16" else "*bf16"
    default = {name: number if name.endswith("_ptr") else "i32" for name in names}
    return default | special | dict.fromkeys(constants, "constexpr")


def _read(cubin: bytes, case: SassCase, shared: int) -> SassReport:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, listing = _cuobjdump("--dump-resource-usage", path), _cuobjdump("--dump-sass", path)
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    registers, stack, local = (int(number) for number in found.groups())
    every = Counter(re.findall(r"\b(?:LDGSTS[A-Z0-9.]*|STL|LDL)\b", listing))
    loop = Counter(name.split(".")[0] for name in main_loop(listing))
    weights = BLOCK_K * case.config.block_n / (LANES * case.config.warps)
    return SassReport(
        instructions_per_weight=sum(loop.values()) / weights,
        registers=registers,
        spilled_bytes=stack + local + every["STL"] + every["LDL"],
        shared_bytes=shared,
        tensor_core=loop["HMMA"] + loop["HGMMA"],
        int_to_float=loop["I2F"] + loop["I2FP"],
        wide_copies=sum(count for name, count in every.items() if name.endswith(".128")),
        waited_loads=loop["LDG"],
    )


def _cuobjdump(option: str, path: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
