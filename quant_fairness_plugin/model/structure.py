"""What a block is made of, read from its modules: linear modules, norms, biases. Torch, and no forward pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from quant_fairness_plugin.model.architectures import Block
from quant_fairness_plugin.model.linear import is_conv1d, is_linear


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear modules inside a module, with their names relative to it."""
    return ((name, child) for name, child in module.named_modules() if is_linear(child))


def norms(module: nn.Module) -> Iterator[str]:
    """Yield the names of the modules that hold only vectors: layer norms of every kind."""
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if parameters and all(p.dim() == 1 for p in parameters):
            yield name


def block_structure(block: nn.Module) -> Block:
    """Return the structure of a block. It may live on the meta device."""
    modules = dict(linears(block))
    conv1d = frozenset(name for name, module in modules.items() if is_conv1d(module))
    return Block(
        linears=tuple(modules),
        conv1d=conv1d,
        plain=frozenset(modules) - conv1d,
        norms=frozenset(norms(block)),
        biased=frozenset(name for name, module in modules.items() if module.bias is not None),
    )
