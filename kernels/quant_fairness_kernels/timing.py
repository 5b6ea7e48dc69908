"""Time per call on a GPU, as decoding sees it: replayed from a CUDA graph, over weights that the cache cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROTATED_BYTES = 240 * 2**20
"""Weights that are gone through before one is used again: more than four times the 50 MB L2 cache of an H200."""
REPLAYS = 30


class Microseconds(NamedTuple):
    """Percentiles of the time per call."""

    p20: float
    p50: float
    p80: float


def copies_needed(bytes_: int) -> int:
    """Copies of a weight of so many bytes to rotate over."""
    return max(2, -(-ROTATED_BYTES // bytes_))


def time_calls(calls: Sequence[Callable[[], Tensor]]) -> Microseconds:
    """Time per call of `calls`, captured one after the other in one CUDA graph.

    Args:
        calls: the same work on different copies of the weight.

    Raises:
        RuntimeError: no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("timing needs an NVIDIA GPU; torch.cuda.is_available() is False")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch's
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = sorted(_replay(graph) / len(calls) for _ in range(REPLAYS))
    return Microseconds(*(times[int(REPLAYS * share)] for share in (0.2, 0.5, 0.8)))


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000
