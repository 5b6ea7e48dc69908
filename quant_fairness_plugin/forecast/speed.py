"""How fast this machine is at the parts that a sweep is made of: timed for a fraction of a second.

Random matrices of the model's own shapes (cut where they would take longer) go through the same library calls as in a
sweep. Every part is timed several times; the fastest and the slowest give the two ends of the estimate. Timed is what
the calling thread computes, as a part of some milliseconds either meets other work on the machine or does not; how much
of the time such work takes is counted over the whole measurement (`Shared`), and lengthens everything alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.forecast.memory import widest_layer
from quant_fairness_plugin.forecast.passes import Range
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.sweep.memory import STACK_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

REPEATS = 4
PIECE = 1 << 27
"""Multiplications of one timed matmul: some milliseconds on one core."""
HEAD_TOKENS = 32
FEW_TOKENS = 18
"""Three prompts in six languages."""
NOTHING = Range(0.0, 0.0)
LEAST_SAMPLE = 0.05
"""Seconds of computing below which they say nothing of what else runs."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds that one unit of work takes here."""

    block: Range
    """Of one token through one block of one state."""
    few: Range
    """The same where only a few tokens go through a block together, as when a model writes."""
    head: Range
    """Of one token's scores in one state."""
    rounding: Range
    """Of one weight that is rounded to the grid."""
    flops: Range
    """Multiplications and additions a second in the matmuls of a block."""
    threads: int
    seconds: float
    """How long was measured."""
    shared: float = 1.0
    """Seconds that passed for a second of computing: above 1 where other work took its part. It is in all of these."""


def measure_speed(outline: Outline, grid: Grid, *, row_tokens: int, heads: int, states: int) -> Speed:
    """Time the parts of a sweep on the CPU.

    Args:
        outline: the model's shapes.
        grid: what weights are rounded to.
        row_tokens: tokens of a sentence.
        heads: attention heads.
        states: how many states the head scores together.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), counting() as shared:
        matmuls, flops = _matmuls(outline, generator, most=STACK_TOKENS.cpu)
        written, _ = _matmuls(outline, generator, most=FEW_TOKENS)
        around = _between(outline, generator, row_tokens=row_tokens, heads=heads)
        head = _head(outline, generator, states=states)
        rounding = _rounding(outline, grid, generator)
    factor = shared.factor
    return Speed(
        block=(matmuls + around).times(factor),
        few=(written + around).times(factor),
        head=head.times(factor),
        rounding=rounding.times(factor),
        flops=flops.times(1 / factor),
        threads=torch.get_num_threads(),
        seconds=shared.passed,
        shared=factor,
    )


@dataclass(slots=True)
class Shared:
    """How the calling thread shared its processor while something was measured."""

    passed: float = 0.0
    """Seconds by the clock."""
    computed: float = 0.0
    """Seconds in which this thread ran."""

    @property
    def factor(self) -> float:
        """How much longer everything took for what else ran on the machine."""
        return 1.0 if self.computed < LEAST_SAMPLE else max(1.0, self.passed / self.computed)


@contextmanager
def counting() -> Iterator[Shared]:
    """Yield what is known, behind the `with` block, of how a processor was shared inside it."""
    shared, passed, computed = Shared(), time.perf_counter(), time.thread_time()
    yield shared
    shared.passed, shared.computed = time.perf_counter() - passed, time.thread_time() - computed


def timed(call: Callable[[], object], *, repeats: int = REPEATS) -> Range:
    """Seconds of computing of the fastest and the slowest of several calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        before = time.thread_time()
        call()
        seconds.append(time.thread_time() - before)
    return Range(min(seconds), max(seconds))


def _random(generator: object, *shape: int) -> Tensor:
    import torch

    return torch.randn(shape, generator=generator)  # type: ignore[call-overload, no-any-return]


def _matmuls(outline: Outline, generator: object, *, most: int) -> tuple[Range, Range]:
    """A token, beside at most so many, through a block's linear modules, and the rate of multiplying and adding."""
    from torch.nn.functional import linear

    shapes = [outline.matrix(name) for name in widest_layer(outline)]
    per_token: dict[tuple[int, int], Range] = {}
    for rows, columns in set(shapes):
        tokens = max(1, min(most, PIECE // (rows * columns)))
        some = max(1, min(rows, PIECE // (tokens * columns)))
        hidden, weight = _random(generator, tokens, columns), _random(generator, some, columns)
        seconds = timed(lambda hidden=hidden, weight=weight: linear(hidden, weight))  # type: ignore[misc]
        per_token[rows, columns] = seconds.times(rows / some / tokens)
    total = sum((per_token[shape] for shape in shapes), NOTHING)
    work = sum(2 * rows * columns for rows, columns in shapes)
    return total, Range(work / total.high, work / total.low)


def _between(outline: Outline, generator: object, *, row_tokens: int, heads: int) -> Range:
    """A token through what else a block does: norms, attention, activation, additions, and stacking."""
    import torch
    from torch.nn import functional

    width, inner = outline.width, max(outline.matrix(name)[1] for name in widest_layer(outline))
    rows = max(1, min(STACK_TOKENS.cpu, PIECE // (8 * (width + inner))) // row_tokens)
    tokens = rows * row_tokens
    hidden, wide = _random(generator, tokens, width), _random(generator, tokens, inner)
    lead = hidden.view(rows, row_tokens, heads, width // heads).transpose(1, 2)
    mask = torch.ones(rows, 1, row_tokens, row_tokens, dtype=torch.bool).tril()

    def run() -> None:
        for _ in range(2):
            normed = functional.layer_norm(hidden, (width,))
            torch.cat([normed]).add(hidden)
        functional.scaled_dot_product_attention(lead, lead, lead, attn_mask=mask)
        functional.silu(wide).mul(wide)

    return timed(run).times(1 / tokens)


def _head(outline: Outline, generator: object, *, states: int) -> Range:
    """One token's scores in one state, by the code that a sweep scores with."""
    import torch

    from quant_fairness_plugin.measure.streamed import Head, score_hidden

    per_column = (states + 1) * HEAD_TOKENS * outline.width
    columns = max(1, min(outline.vocabulary, PIECE // per_column))
    reference, hidden = (
        _random(generator, HEAD_TOKENS, outline.width),
        _random(generator, states, HEAD_TOKENS, outline.width),
    )
    head = Head(_random(generator, columns, outline.width), None)
    targets = torch.zeros(HEAD_TOKENS, dtype=torch.long)
    seconds = timed(lambda: score_hidden(reference, hidden, targets, head))
    return seconds.times(outline.vocabulary / columns / ((states + 1) * HEAD_TOKENS))


def _rounding(outline: Outline, grid: Grid, generator: object) -> Range:
    import torch

    from quant_fairness_plugin.quantize.grid import quantize_rtn
    from quant_fairness_plugin.quantize.grid_rules import unit_grid

    columns = outline.width
    rows = max(1, min(columns, (1 << 20) // columns))
    weight = _random(generator, rows, columns)
    fitting = unit_grid(grid, (columns,))
    if fitting.group_size != -1 and columns % fitting.group_size:
        fitting = Grid(bits=grid.bits, group_size=-1)
    seconds = timed(lambda: quantize_rtn(weight, fitting, scale_dtype=torch.float16).dequantize())
    return seconds.times(1 / weight.numel())
