"""Step 3, scores of many states at once from what their heads are given, streamed over the vocabulary.

Per-token NLL, KL to the 16-bit model and top-1 flips of S states need S + 1 distributions over the whole vocabulary.
Here they are never held: the head is applied to all states together, a slice of the vocabulary at a time, and running
sums are kept (the online softmax of Milakov and Gimelshein, arXiv 1805.02867, extended by the cross term of the KL).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_ELEMENTS = 1 << 23
"""Logits that are held at once, all states together (32 MiB in float32)."""


@dataclass(frozen=True, slots=True)
class Head:
    """An output head."""

    weight: Tensor
    """`[vocabulary, width]`."""
    bias: Tensor | None

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """Logits of a slice of the vocabulary, float32 `[…, slice]`."""
        bias = None if self.bias is None else self.bias[part]
        return torch.nn.functional.linear(hidden, self.weight[part], bias).float()


@dataclass(slots=True)
class _Running:
    """Log-sum-exp and best token so far, `[rows]` each."""

    peak: Tensor
    total: Tensor
    best: Tensor
    best_value: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> _Running:
        return cls(
            torch.full((rows,), -torch.inf, device=device),
            torch.zeros(rows, dtype=torch.float64, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.full((rows,), -torch.inf, device=device),
        )

    def add(self, logits: Tensor, start: int) -> Tensor:
        """Take in `[rows, slice]`; returns by how much sums against the old peak shrink, `[rows]` in float64."""
        value, index = logits.max(dim=1)
        peak = torch.maximum(self.peak, value)
        shrink = torch.exp((self.peak - peak).double())
        part = torch.exp(logits - peak[:, None]).sum(dim=1, dtype=torch.float64)
        self.total = self.total * shrink + part
        better = value > self.best_value
        self.best = torch.where(better, index + start, self.best)
        self.best_value = torch.where(better, value, self.best_value)
        self.peak = peak
        return shrink

    @property
    def log_normalizer(self) -> Tensor:
        return self.peak.double() + self.total.log()


@torch.no_grad()
def score_hidden(
    reference: Tensor, states: Tensor, targets: Tensor, head: Head, *, state_head: Head | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token scores of the 16-bit model and of states, in float64.

    KL(p16 ‖ p) = Σ p16 (l16 - l) - log Z16 + log Z, with the sum over the vocabulary taken slice by slice.

    Args:
        reference: what the 16-bit model's head is given, `[tokens, width]`.
        states: the same of each state, `[states, tokens, width]`.
        targets: token ids, `[tokens]`.
        head: the 16-bit head.
        state_head: the head of the states, where it is another one.

    Returns:
        NLL of the 16-bit model `[tokens]`, and `[states, tokens, 3]`: NLL, KL and flip (0 or 1) of each state.
    """
    count, tokens, width = states.shape
    flat = states.reshape(count * tokens, width)
    own, others = _Running.empty(tokens, flat.device), _Running.empty(count * tokens, flat.device)
    cross = torch.zeros(count, tokens, dtype=torch.float64, device=flat.device)
    chosen = torch.zeros(count + 1, tokens, dtype=torch.float64, device=flat.device)
    for part in _slices(head.weight.shape[0], (count + 1) * tokens):
        expected = head.logits(reference, part)
        found = (state_head or head).logits(flat, part)
        shrink = own.add(expected, part.start)
        others.add(found, part.start)
        weights = torch.exp(expected - own.peak[:, None])
        found = found.view(count, tokens, -1)
        _pick(chosen, expected, found, targets, part)
        difference = torch.sub(expected, found)
        cross = cross * shrink + torch.einsum("tv,stv->st", weights, difference).double()
    log_z, log_zs = own.log_normalizer, others.log_normalizer.view(count, tokens)
    kl = cross / own.total - log_z + log_zs
    flips = (others.best.view(count, tokens) != own.best).double()
    return log_z - chosen[0], torch.stack([log_zs - chosen[1:], kl.clamp_min(0), flips], dim=2)


def _slices(vocabulary: int, rows: int) -> Iterator[slice]:
    size = max(1, SLICE_ELEMENTS // rows)
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))


def _pick(chosen: Tensor, expected: Tensor, found: Tensor, targets: Tensor, part: slice) -> None:
    """Note the logits of the targets that lie in this slice."""
    inside = ((targets >= part.start) & (targets < part.stop)).nonzero()[:, 0]
    column = targets[inside] - part.start
    chosen[0, inside] = expected[inside, column].double()
    chosen[1:, inside] = found[:, inside, column].double()
