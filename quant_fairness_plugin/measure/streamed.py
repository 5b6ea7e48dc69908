"""Scores of many states at once from what their heads are given, streamed over the vocabulary.

Per-token NLL, KL to the 16-bit model and top-1 flips of S states need S + 1 distributions over the whole vocabulary.
Here they are never held: the head is applied to all states together, a slice of the vocabulary and some tokens at a
time, with running sums (the online softmax of Milakov and Gimelshein, arXiv 1805.02867, extended by the cross
term of the KL). Logits are read five times; pieces are so small that a CPU's cache holds them meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant_fairness_plugin.model.devices import ByDevice, wide_dtype

if TYPE_CHECKING:
    from quant_fairness_plugin.model.tables import Table  # loads Transformers, which a forecast does without

PIECE_ELEMENTS = ByDevice(cpu=1 << 19, accelerator=1 << 26)
"""Logits that are held at once, all states together: 2 MiB in float32 on a CPU; on a GPU, launches cost more."""
SLICE_COLUMNS = ByDevice(cpu=1 << 11, accelerator=1 << 14)
"""Tokens of the vocabulary in a slice: the head's rows for them are used again for every piece."""


@dataclass(frozen=True, slots=True)
class Head:
    """An output head."""

    weight: Tensor
    """`[vocabulary, width]`."""
    bias: Tensor | None
    rule: Callable[[Tensor], Tensor] | None = None
    """What the model does to the output, value by value; None where it is the logits."""

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """Return logits of a slice of the vocabulary, float32 `[…, slice]`; a head in another type is converted."""
        bias = None if self.bias is None else self.bias[part].to(hidden.dtype)
        logits = torch.nn.functional.linear(hidden, self._rows(part).to(hidden.dtype), bias).float()
        return logits if self.rule is None else self.rule(logits)

    def equals(self, other: Head) -> bool:
        """Return whether both give the same logits."""
        if type(self) is not type(other) or self.weight.shape != other.weight.shape:
            return False
        return _equal(self.bias, other.bias) and self._same_rows(other)

    def _rows(self, part: slice) -> Tensor:
        return self.weight[part]

    def _same_rows(self, other: Head) -> bool:
        return _equal(self.weight, other.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHead(Head):
    """A head that is read slice by slice; a slice stays in memory until the next one is read."""

    table: Table
    _last: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def _rows(self, part: slice) -> Tensor:
        key = (part.start, part.stop)
        if key not in self._last:
            self._last.clear()
            self._last[key] = self.table.part(part)
        return self._last[key]

    def _same_rows(self, other: Head) -> bool:
        assert isinstance(other, FileHead)
        return self.table is other.table or self.table.equals(other.table)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.device == other.device and one.dtype == other.dtype and torch.equal(one, other))


@dataclass(frozen=True, slots=True)
class _Running:
    """Sums over the vocabulary so far, `[tokens, 1 + states]` each; the first column is the 16-bit model's."""

    peak: Tensor
    total: Tensor
    best: Tensor
    best_value: Tensor
    target: Tensor
    """Logits of the targets."""
    cross: Tensor
    """Σ exp(l16 - peak16) (l16 - l); 0 in the first column."""

    @classmethod
    def empty(cls, tokens: int, states: int, device: torch.device) -> _Running:
        shape = (tokens, 1 + states)
        sums = [torch.zeros(shape, dtype=wide_dtype(device), device=device) for _ in range(3)]
        lowest = [torch.full(shape, -torch.inf, device=device) for _ in range(2)]
        best = torch.zeros(shape, dtype=torch.long, device=device)
        return cls(lowest[0], sums[0], best, lowest[1], sums[1], sums[2])

    def add(self, tokens: slice, logits: Tensor, targets: Tensor, start: int) -> None:
        """Take in a piece: logits `[tokens, 1 + states, slice]`, which are overwritten, from token `start` on."""
        self._take_targets(tokens, logits, targets - start)
        value, index = logits.max(dim=2)
        better = value > self.best_value[tokens]
        self.best[tokens] = torch.where(better, index + start, self.best[tokens])
        self.best_value[tokens] = torch.where(better, value, self.best_value[tokens])
        wide, peak = self.total.dtype, torch.maximum(self.peak[tokens], value)
        shrink = torch.exp((self.peak[tokens] - peak).to(wide))
        self.peak[tokens] = peak
        difference = logits[:, :1] - logits[:, 1:]
        weights = logits.sub_(peak[:, :, None]).exp_()
        # A sum of few thousand float32 is exact to 1e-7; what is added up over slices is wide.
        self.total[tokens] = self.total[tokens] * shrink + weights.sum(dim=2).to(wide)
        cross = (difference @ weights[:, 0, :, None])[:, :, 0].to(wide)
        self.cross[tokens, 1:] = self.cross[tokens, 1:] * shrink[:, :1] + cross

    def _take_targets(self, tokens: slice, logits: Tensor, columns: Tensor) -> None:
        inside = ((columns >= 0) & (columns < logits.shape[2])).nonzero()[:, 0]
        self.target[tokens.start + inside] = logits[inside, :, columns[inside]].to(self.target.dtype)

    @property
    def nll(self) -> Tensor:
        """Negative log-likelihood of the targets, `[tokens, 1 + states]`."""
        return self.log_normalizer - self.target

    @property
    def log_normalizer(self) -> Tensor:
        """Log-sum-exp of all logits, `[tokens, 1 + states]`."""
        return self.peak.to(self.total.dtype) + self.total.log()


@torch.no_grad()
def score_hidden(
    reference: Tensor, states: Tensor, targets: Tensor, head: Head, *, state_head: Head | None = None
) -> tuple[Tensor, Tensor]:
    """Return per-token scores of the 16-bit model and of states, in float64 (float32 on MPS, which has no other).

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
    count, tokens, _ = states.shape
    hidden = torch.cat([reference[None], states]).transpose(0, 1).contiguous()
    running = _Running.empty(tokens, count, hidden.device)
    for part, some in _pieces(head.weight.shape[0], tokens, 1 + count, hidden.device):
        running.add(some, _logits(hidden[some], part, head, state_head), targets[some], part.start)
    log_z, nll = running.log_normalizer, running.nll
    kl = running.cross[:, 1:] / running.total[:, :1] - log_z[:, :1] + log_z[:, 1:]
    flips = (running.best[:, 1:] != running.best[:, :1]).to(kl.dtype)
    return nll[:, 0], torch.stack([nll[:, 1:], kl.clamp_min(0), flips], dim=2).transpose(0, 1)


def _logits(hidden: Tensor, part: slice, head: Head, state_head: Head | None) -> Tensor:
    """`[tokens, 1 + states, slice]`, as one product where all have the same head."""
    if state_head is None:
        return head.logits(hidden.flatten(0, 1), part).view(*hidden.shape[:2], -1)
    first, others = head.logits(hidden[:, 0], part), state_head.logits(hidden[:, 1:].flatten(0, 1), part)
    return torch.cat([first[:, None], others.view(hidden.shape[0], hidden.shape[1] - 1, -1)], dim=1)


def _pieces(vocabulary: int, tokens: int, states: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of the vocabulary, and for each all pieces of the tokens."""
    elements, columns = PIECE_ELEMENTS.on(device.type), SLICE_COLUMNS.on(device.type)
    columns = min(columns, vocabulary, max(1, elements // states))
    some = max(1, elements // (states * columns))
    for start in range(0, vocabulary, columns):
        for first in range(0, tokens, some):
            yield slice(start, min(start + columns, vocabulary)), slice(first, min(first + some, tokens))
