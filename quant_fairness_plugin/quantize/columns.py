"""Input channels that keep 16 bit beside the integers of a quantized module.

Takes the weights of a fusion group, their Hessians and their integers; returns which channels lose most, and what has
to be added to the dequantized weight there: W16 - deq(q). The integers stay complete, so that a program that does not
know of this reads an ordinary quantized weight.

A channel loses the squared error of its weights times the mean square of its input: the diagonal of the fair Hessian,
which divides every language's moment by that language's output energy. The modules of a fusion group share their
inputs and are computed in one launch, so they keep the same channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.grid_rules import column_count


@dataclass(frozen=True, slots=True)
class KeptColumns:
    """What one quantized module keeps in 16 bit; its output gains `x[..., index] @ delta^T`."""

    index: Tensor
    """int32 `[C]`, input channels, ascending."""
    delta: Tensor
    """16-bit float `[rows, C]`: the original weight minus the dequantized one."""

    def added_to(self, weight: Tensor) -> Tensor:
        """Return a copy of the dequantized weight, float32 `[rows, cols]`, with 16-bit values in these channels."""
        return weight.index_add(1, self.index.long(), self.delta.to(weight))


@dataclass(frozen=True, slots=True)
class Target:
    """What a module of an unfinished block is to compute, and the channels in which it will do so in 16 bit."""

    weight: Tensor
    """float32 `[rows, cols]`; AWQ scales its columns, and its rows when the next module's scale is folded into it."""
    index: Tensor
    """int32 `[C]`."""

    def divided(self, scale: Tensor) -> Target:
        """The same with each row divided by its scale `[rows]`."""
        return Target(self.weight / scale.to(self.weight).unsqueeze(1), self.index)

    def columns(self, tensor: QuantizedTensor) -> KeptColumns:
        """What the integers lack, rounded once to the type of the scales."""
        index = self.index.long()
        missing = self.weight[:, index] - tensor.dequantize()[:, index]
        return KeptColumns(self.index, missing.to(tensor.scales.dtype))


def choose_columns(
    errors: Mapping[str, Tensor], hessians: Mapping[str, Tensor], share: float, *, scale: Tensor | None = None
) -> Tensor:
    """The input channels of a fusion group that lose most.

    Args:
        errors: module → dequantized minus original weight `[rows, cols]`.
        hessians: module → second moment of the common inputs `[cols, cols]`, as `fair_moments` weighs it.
        share: of the channels.
        scale: what the weights' columns were multiplied by, and so the inputs divided by, `[cols]` (AWQ).

    Returns:
        int32 `[C]`, ascending; of equals the first.
    """
    losses = [error.square().sum(0).to(hessians[name]) * hessians[name].diagonal() for name, error in errors.items()]
    loss = torch.stack(losses).sum(0)
    if scale is not None:
        loss = loss / scale.to(loss).square()
    order = torch.argsort(loss, descending=True, stable=True)
    return order[: column_count(share, len(loss))].sort().values.to(torch.int32)


def decoupled(hessian: Tensor, index: Tensor) -> Tensor:
    """Return the Hessian as if the channels `index` and the others never occurred together.

    GPTQ then lets neither make up for the other's errors: those of 16-bit channels do not exist once their values are
    put back, and a correction for them would be a new error.
    """
    apart = hessian.clone()
    wide = torch.zeros(len(hessian), dtype=torch.bool, device=hessian.device)
    wide[index.long()] = True
    apart[wide.unsqueeze(0) != wide.unsqueeze(1)] = 0
    return apart
