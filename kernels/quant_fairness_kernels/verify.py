"""Are the kernels right here? A grid of cases, each compared with `naive` in float64.

    TRITON_INTERPRET=1 python -m quant_fairness_kernels.verify --grid small     without a GPU
    python -m quant_fairness_kernels.verify --grid full                         on one

Writes one JSON line per case. Tests, the benchmark and the tuner all run this grid, so that no figure is ever given for
a kernel that fails it. Uninitialized memory is NaN while it runs, so an element that a kernel leaves out is seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from quant_fairness_kernels.kernel_config import KernelConfig
from quant_fairness_kernels.launch import Mixed, missing_for_triton, triton_matmul
from quant_fairness_kernels.naive import naive_dequantize, naive_matmul
from quant_fairness_kernels.nibble_planes import SYMMETRIC_ZERO, clear_channels, pack_planes

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest relative Frobenius error: two unit roundoffs of the type (2^-11, 2^-8). One is the rounding of the result;
the other that of the scaled weights, where the kernel scales before it multiplies. Sums are float32: another 1e-6."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Case:
    """One call; `split_k` and later fields override the configuration that would be chosen, where not None."""

    M: int
    N: int
    K: int
    groups: int
    symmetric: bool = True
    dtype: Literal["float16", "bfloat16"] = "float16"
    act_order: bool = False
    columns: int = 0
    dense: int = 0
    bias: bool = False
    silu_mul: bool = False
    config: KernelConfig | None = None

    @property
    def name(self) -> str:
        """All that is not the default, for a test's name."""
        extras = [f"columns{self.columns}" * bool(self.columns), f"dense{self.dense}" * bool(self.dense)]
        extras += ["act-order" * self.act_order, "bias" * self.bias, "silu" * self.silu_mul]
        extras += ["" if self.symmetric else "zeros", "" if self.config is None else config_label(self.config)]
        sizes = f"{self.M}x{self.N}x{self.K}-groups{self.groups}-{self.dtype}"
        return "-".join([sizes, *(extra for extra in extras if extra)])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case gave."""

    error: float
    """Relative Frobenius error against float64."""
    tolerance: float
    repeatable: bool
    """A second call gave the same bits."""
    counters_zero: bool

    @property
    def passed(self) -> bool:
        """All of it; a NaN error does not pass."""
        return self.error <= self.tolerance and self.repeatable and self.counters_zero


def config_label(config: KernelConfig) -> str:
    """A configuration as one word: `tr16x128k4w4s4b` is transposed, split 4 ways, 4 warps, 4 stages, scaled before."""
    form = "tr" if config.transposed else "fwd"
    after = "a" if config.scale_after else "b"
    return f"{form}{config.block_m}x{config.block_n}k{config.split_k}w{config.warps}s{config.stages}{after}"


def grid(size: Literal["small", "full"]) -> list[Case]:
    """The cases: every M, group size and split at least once in `small`, and in more combinations in `full`."""
    tokens = (1, 2, 3, 7, 16, 17, 33, 64, 130)
    groups = {32: 15, 64: 6, 128: 3, 0: 1}
    lengths = {32: 480, 64: 384, 128: 384, 0: 333}
    cases = []
    for position, M in enumerate(tokens):
        for turn, group in enumerate(groups):
            if size == "small" and turn != position % 4:
                continue
            for symmetric in (True, False) if size == "full" else (position % 2 == 0,):
                dtype: Literal["float16", "bfloat16"] = "bfloat16" if (position + turn) % 3 == 1 else "float16"
                case = Case(M, 131 + 67 * turn, lengths[group], groups[group], symmetric, dtype)
                cases.append(replace(case, act_order=position % 3 == 2, bias=position % 2 == 1))
    return cases + list(_mixed(size)) + list(_splits(size))


def run_case(case: Case, *, device: str = "cpu", seed: int = 0) -> Outcome:
    """Both sides of one case, on random integers, scales and activations."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.dtype]
    integers, scales, zeros, group_index = _weight(case, dtype, generator)
    x = torch.randn(case.M, case.K, generator=generator).to(dtype)
    columns = _columns(case, dtype, generator)
    if columns is not None and group_index is None:
        integers = clear_channels(integers, zeros, columns[0])
    dense = torch.randn(case.dense, case.K, generator=generator).to(dtype) / 20 if case.dense else None
    bias = torch.randn(case.N + case.dense, generator=generator).to(dtype) if case.bias else None
    weight = naive_dequantize(integers, scales, zeros, group_index=group_index)
    truth = naive_matmul(x, weight, columns=columns, dense=dense, bias=bias, silu_mul=case.silu_mul)
    planes = pack_planes(integers, scales, zeros, group_index=group_index).to(device)
    index, added = columns or (None, None)
    mixed = Mixed(
        column_index=None if index is None else index.to(device),
        column_weights=None if added is None else added.to(device),
        dense=None if dense is None else dense.to(device),
        bias=None if bias is None else bias.to(device),
        silu_mul=case.silu_mul,
    )
    with poisoned_memory():
        first, second = (triton_matmul(x.to(device), planes, mixed, case.config).cpu() for _ in range(2))
    return Outcome(
        error=relative_error(first, truth),
        tolerance=TOLERANCE[dtype],
        repeatable=torch.equal(first.view(torch.int16), second.view(torch.int16)),
        counters_zero=not planes.counters.any().item(),
    )


def relative_error(got: Tensor, truth: Tensor) -> float:
    """`|got - truth| / |truth|` in the Frobenius norm, computed in float64; NaN if anything is NaN."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` returns NaN, as torch's deterministic mode fills it."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # a module property
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def main(arguments: list[str] | None = None) -> int:
    """Run a grid and write one JSON line per case; 1 if any fails."""
    parser = argparse.ArgumentParser(prog="python -m quant_fairness_kernels.verify", description=__doc__)
    parser.add_argument("--grid", choices=("small", "full"), default="small")
    chosen = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = missing_for_triton(torch.device(device))
    if missing is not None:
        parser.error(f"the Triton kernels cannot run: {missing}")
    failed = 0
    for case in grid(chosen.grid):
        outcome = run_case(case, device=device)
        failed += not outcome.passed
        sys.stdout.write(json.dumps(row(case, outcome)) + "\n")
    return int(failed > 0)


def row(case: Case, outcome: Outcome) -> dict[str, Any]:
    """One line of the output."""
    return {"name": case.name, **asdict(case), **asdict(outcome), "passed": outcome.passed}


def _mixed(size: str) -> Iterator[Case]:
    base = Case(17, 200, 512, 4, symmetric=False, bias=True)
    forms: list[KernelConfig | None] = [None]
    if size == "full":
        forms += [replace(form, split_k=2) for form in _FORMS]
    for form in forms:
        yield replace(base, columns=5, config=form)
        yield replace(base, columns=41, act_order=True, dtype="bfloat16", config=form)
        yield replace(base, dense=70, columns=3, config=form)
        yield replace(base, silu_mul=True, config=form)
    yield Case(1600, 256, 256, 2, symmetric=False, columns=3, dense=20, bias=True, act_order=True)
    yield Case(1600, 128, 96, 3, dtype="bfloat16", silu_mul=True)


def _splits(size: str) -> Iterator[Case]:
    for form in _FORMS:
        for split in range(1, 9) if size == "full" else (1, 3, 8):
            config = replace(form, split_k=split)
            case = Case(19, 256, 1100, 1, config=config)
            if size == "small":  # every run is meant to be quick: two tiles of rows once, groups that 3 does not divide
                case = replace(case, M=19 if split == 3 else 5)
            groups = 9 if size == "full" else 5
            yield replace(case, K=128 * groups, groups=groups) if split % 2 else case
            if size == "full":
                yield Case(19, 256, 1152, 36, symmetric=False, config=config)


_FORMS = (
    KernelConfig(16, 128, 1, 4, 4, transposed=False, scale_after=True),
    KernelConfig(64, 64, 1, 4, 4, transposed=False, scale_after=False),
    KernelConfig(16, 128, 1, 4, 4, transposed=True, scale_after=True),
    KernelConfig(32, 256, 1, 8, 3, transposed=True, scale_after=False),
)


def _weight(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    integers = torch.randint(0, 16, (case.N, case.K), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(case.N, case.groups, generator=generator) * 0.02 + 1e-3).to(dtype)
    zeros = torch.randint(0, 16, (case.N, case.groups), dtype=torch.uint8, generator=generator)
    if case.symmetric:
        zeros = torch.full_like(zeros, SYMMETRIC_ZERO)
    order = torch.randperm(case.K, generator=generator) // (case.K // case.groups)
    return integers, scales, zeros, order if case.act_order and case.groups > 1 else None


def _columns(case: Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    if not case.columns:
        return None
    index = torch.randperm(case.K, generator=generator)[: case.columns].sort().values.to(torch.int32)
    return index, torch.randn(case.columns, case.N, generator=generator).to(dtype)


if __name__ == "__main__":
    raise SystemExit(main())
