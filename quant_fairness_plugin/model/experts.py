"""Experts as linear modules: one view of what Transformers stacks in one tensor a layer.

Every family with Transformers' standard interface says of its experts whether they have a gate, biases, transposed or
interleaved matrices. `unfold_experts` puts an `Experts` in the place of each such module, whose children are the
matrices under the names that files have (`experts.3.gate_proj`); they are views of the stacked tensors, so nothing is
copied. From there on, experts are quantized, exchanged, stored and read as any linear module is. `stacked` is the way
back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.architectures.experts import Mixture, find_mixture

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True)
class Routing:
    """Where the tokens of one call of a layer's experts go."""

    hidden: Tensor
    """`[tokens, width]`: what the experts are given."""
    chosen: Tensor
    """`[tokens, k]`: numbers of experts."""
    weights: Tensor
    """`[tokens, k]`: what each chosen expert's output is multiplied by."""


class Experts(nn.Module):
    """The routed experts of a layer, each a module with its matrices as linear modules."""

    def __init__(self, stacked: nn.Module, mixture: Mixture) -> None:
        """Take over the stacked tensors of a module with the standard interface; it must not be used any more."""
        super().__init__()
        source: Any = stacked
        self.names = mixture.names
        self.is_transposed = bool(source.is_transposed)
        both = _matrices(source.gate_up_proj, self.is_transposed)
        for number, down in enumerate(_matrices(source.down_proj, self.is_transposed)):
            gate, up = both[number].chunk(2)
            members = zip(self.names, (gate, up, down), strict=True)
            self.add_module(str(number), nn.ModuleDict({name: _linear(matrix) for name, matrix in members}))
        stacked._parameters.clear()  # the views above hold the values
        self._apply_gate: Callable[[Tensor], Tensor] = source._apply_gate

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self._modules)

    def expert(self, number: int) -> dict[str, nn.Linear]:
        """Return the matrices of one expert by the last part of their names: gate, up, down."""
        return dict(self.get_submodule(str(number)).items())  # type: ignore[operator] # a ModuleDict

    def inner(self, number: int, hidden: Tensor) -> Tensor:
        """Return what one expert's last matrix is given for `[rows, width]` inputs."""
        gate, up, _ = self.expert(number).values()
        return self._apply_gate(torch.cat((gate(hidden), up(hidden)), dim=-1))

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of the chosen experts' outputs, each times its weight, `[tokens, width]`."""
        result = torch.zeros_like(hidden)
        for number in range(len(self)):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if len(token):
                down = self.expert(number)[self.names[2]]
                output = down(self.inner(number, hidden[token])) * weights[token, place, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result

    def routing(self, positional: tuple[Any, ...]) -> Routing:
        """Return the routing of a call by its arguments, as a forward pre-hook is given them."""
        hidden, chosen, weights = positional
        return Routing(hidden.detach(), chosen, weights.detach())


def unfold_experts(model: nn.Module) -> None:
    """Put an `Experts` in the place of every stacked experts module of a family that is taken, on any device."""
    mixture = find_mixture(str(getattr(getattr(model, "config", None), "model_type", "")))
    if mixture is None:
        return
    for name, module in [entry for entry in model.named_modules() if _unfoldable(entry[1])]:
        model.set_submodule(name, Experts(module, mixture))


def with_unfolded_experts(model: AnyModel) -> AnyModel:
    """Return a model of the same tensors whose experts are unfolded: itself where there are none, else a copy.

    The given model is not changed, and no tensor is copied.
    """
    if find_mixture(str(model.config.model_type)) is None or not any(map(_unfoldable, model.modules())):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    unfold_experts(twin)
    return twin


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yield the unfolded experts of a model by full name, in forward order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


def stacked_shapes(experts: Experts) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `stacked` makes, by the last part of their names."""
    gate, _, down = experts.expert(0).values()
    both, last = (len(experts), 2 * gate.out_features, gate.in_features), (len(experts), *down.weight.shape)
    if experts.is_transposed:
        both, last = (both[0], both[2], both[1]), (last[0], last[2], last[1])
    return {"gate_up_proj": both, "down_proj": last}


def stacked(experts: Experts, value: Callable[[str], Tensor] | None = None) -> dict[str, Callable[[], Tensor]]:
    """Return how to make the tensors of a layer's experts as Transformers holds them, by the last part of their names.

    The inverse of unfolding.

    Args:
        experts: them.
        value: parameter of the experts, such as `3.down_proj.weight` → its value; None takes what is in memory.
    """
    own = experts.get_parameter if value is None else value

    def matrix(number: int, name: str) -> Tensor:
        return own(f"{number}.{name}.weight").detach()

    def both() -> Tensor:
        rows = [torch.cat([matrix(number, name) for name in experts.names[:2]]) for number in range(len(experts))]
        return _turned(torch.stack(rows), experts.is_transposed)

    def down() -> Tensor:
        rows = [matrix(number, experts.names[2]) for number in range(len(experts))]
        return _turned(torch.stack(rows), experts.is_transposed)

    return {"gate_up_proj": both, "down_proj": down}


def _turned(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if transposed else tensor


def _unfoldable(module: nn.Module) -> bool:
    """Return whether a module has the standard interface, in the layout that the families here have."""
    if isinstance(module, Experts) or not all(hasattr(module, name) for name in _INTERFACE):
        return False
    known: Any = module
    return bool(known.has_gate and not known.has_bias and known.is_concatenated)


def _matrices(stack: Tensor, transposed: bool) -> list[Tensor]:
    """Return the matrices of a stacked tensor as `[out_features, in_features]` views."""
    return [matrix.t() if transposed else matrix for matrix in stack.detach()]


def _linear(matrix: Tensor) -> nn.Linear:
    """Return a linear module without bias that uses a matrix, uncopied."""
    rows, cols = matrix.shape
    with torch.device("meta"):
        linear = nn.Linear(cols, rows, bias=False)
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    return linear
