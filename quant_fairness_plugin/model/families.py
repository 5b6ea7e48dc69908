"""Step 1, family maps: where a model's blocks, fusion groups, embeddings, final norm and head are.

A family is recognised by structure: which linear and norm modules its blocks hold, under which names. Class names are
never looked at; `config.model_type` only picks between families of the same structure. Importing this module does not
import torch; `detect_family` does, when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import KNOWN_FAMILIES, LAYOUTS, Layout, Unit
from quant_fairness_plugin.model.resolve import MIXTURE_ADVICE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


__all__ = ["KNOWN_FAMILIES", "Block", "Family", "Unit", "detect_family"]

MIXTURE_WORDS = frozenset({"expert", "experts", "moe", "router"})
"""Parts of module names, between dots and underscores, such as `block_sparse_moe` or `shared_expert_gate`."""


@dataclass(frozen=True, slots=True)
class Family:
    """The map of an architecture, as found in one model."""

    name: str
    blocks: str
    """Full name of the list of decoder blocks."""
    units: tuple[Unit, ...]
    """Every linear module of a block, each exactly once, in forward order."""
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str
    tied_head: bool
    """Whether the head's weight is the input embedding's."""
    conv1d: bool
    """Whether the linear modules store their weight as `[in_features, out_features]`."""

    @property
    def generic(self) -> bool:
        """Whether the architecture is unknown: only whole layers can be protected, and fused names are not known."""
        return self.name == "generic"

    def modules(self) -> tuple[str, ...]:
        """Names of all linear modules of a block, relative to it, in forward order."""
        return tuple(module for unit in self.units for module in unit.modules)

    def full_names(self, layer: int) -> tuple[str, ...]:
        """Full names of a layer's linear modules, in forward order."""
        return tuple(f"{self.blocks}.{layer}.{module}" for module in self.modules())

    def fused_names(self, layer: int) -> tuple[str, ...]:
        """Full names under which servers know a layer's merged modules; empty where nothing is merged."""
        return tuple(f"{self.blocks}.{layer}.{unit.fused}" for unit in self.units if unit.fused is not None)


@dataclass(frozen=True, slots=True)
class Block:
    """The structure of one block, names relative to it."""

    linears: tuple[str, ...]
    conv1d: frozenset[str]
    norms: frozenset[str]
    biased: frozenset[str]

    def fits(self, layout: Layout) -> bool:
        """Whether this is a block of one of the layout's families."""
        modules = [module for unit in layout.units for module in unit.modules]
        return (
            set(self.linears) == set(modules)
            and self.conv1d == (frozenset(modules) if layout.conv1d else frozenset())
            and self.norms == layout.norms
            and layout.biased in (None, self.biased)
        )


def detect_family(model: PreTrainedModel) -> Family:
    """The map of a model, found from the modules that it is made of. The model may live on the meta device.

    Returns:
        A known family, or one named `generic` for an unknown architecture with exactly one list of two or more equal
        blocks: every linear module of a block is then its own unit.

    Raises:
        UnsupportedModelError: no output head, experts, adapters, blocks that differ or share weights, an encoder, or
            no list of blocks; says what was looked for.
    """
    path, blocks = _block_list(model)
    _refuse_adapters_and_experts(model, path, blocks)
    structures = [_structure(block) for block in blocks]
    if len(set(structures)) > 1:
        other = next(i for i, structure in enumerate(structures) if structure != structures[0])
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks 0 and {other} of {path} hold different modules; looked for a list of equal "
            f"decoder blocks. Supported are {', '.join(KNOWN_FAMILIES)} and models of that shape."
        )
    for layout in LAYOUTS:
        if layout.blocks == path and structures[0].fits(layout):
            return _known(model, layout)
    return _generic(model, path, structures)


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def _block_list(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The only outermost `ModuleList` whose members hold linear modules: its full name and its blocks."""
    from torch import nn

    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in _linears(module)):
            lists[name] = module
    looked_for = f"Looked for one list of decoder blocks, as in {', '.join(KNOWN_FAMILIES)}"
    if len(lists) != 1:
        found = f"several lists of blocks ({', '.join(lists)})" if lists else "no list of blocks with linear modules"
        raise UnsupportedModelError(f"{_kind(model)}: {found}. {looked_for}; use a decoder-only model of that shape.")
    [(path, blocks)] = lists.items()
    if "encoder" in path.split("."):
        raise UnsupportedModelError(
            f"{_kind(model)}: the blocks at {path} are an encoder's. {looked_for}; use such a model."
        )
    weights = [id(module.weight) for block in blocks for _, module in _linears(block)]
    if len(set(weights)) != len(weights):
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks of {path} share weights, so that one layer cannot be protected alone. "
            f"{looked_for}; use a model whose blocks have their own."
        )
    return path, list(blocks)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from quant_fairness_plugin.model.linear import is_linear

    return ((name, child) for name, child in module.named_modules() if is_linear(child))


def _refuse_adapters_and_experts(model: nn.Module, path: str, blocks: list[nn.Module]) -> None:
    mixture: list[str] = []
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            if any(part.startswith("lora_") for part in name.split(".")):
                raise UnsupportedModelError(
                    f"{_kind(model)}: {path}.{i}.{name} is an unmerged LoRA adapter; allowed are plain models. "
                    "Merge it first (peft's merge_and_unload)."
                )
            if _holds_experts(name, module):
                mixture.append(f"{path}.{i}.{name}")
    if mixture:
        where = next((name for name in mixture if name.endswith(".experts")), mixture[0])
        raise UnsupportedModelError(f"{_kind(model)}: {where} holds a mixture of experts, {MIXTURE_ADVICE}")


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module is an expert, a router, a choice of several MLPs, or stacks matrices in one tensor.

    By what they are called and by what they are made of, since a router with one shared expert has the linear modules
    of a dense block: quantized as one, its experts would stay as they are.
    """
    from torch import nn

    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    stacked = not convolution and any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
    several = isinstance(module, nn.ModuleList) and sum(any(True for _ in _linears(member)) for member in module) > 1
    named = not MIXTURE_WORDS.isdisjoint(name.replace(".", "_").split("_")) or name.split(".")[-1] == "gate"
    # Experts of rank one are rows of an embedding table; no dense block looks anything up.
    return stacked or several or named or isinstance(module, nn.Embedding)


def _structure(block: nn.Module) -> Block:
    from quant_fairness_plugin.model.linear import is_conv1d

    linears = list(_linears(block))
    return Block(
        linears=tuple(name for name, _ in linears),
        conv1d=frozenset(name for name, module in linears if is_conv1d(module)),
        norms=frozenset(_norms(block)),
        biased=frozenset(name for name, module in linears if module.bias is not None),
    )


def _norms(module: nn.Module) -> Iterator[str]:
    """Names of the modules that own only vectors: layer norms of every kind."""
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if parameters and all(p.dim() == 1 for p in parameters):
            yield name


def _known(model: PreTrainedModel, layout: Layout) -> Family:
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in layout.embeddings if name not in present]
    if missing:
        raise UnsupportedModelError(
            f"{_kind(model)}: the blocks are those of {layout.families[0]}, but {missing[0]} is missing; looked for "
            f"{', '.join(layout.embeddings)}. Use a model with the embeddings of its family."
        )
    kind = _kind(model)
    head, tied = _head(model)
    return Family(
        name=kind if kind in layout.families else layout.families[0],
        blocks=layout.blocks,
        units=layout.units,
        embeddings=layout.embeddings,
        final_norm=layout.final_norm if layout.final_norm in present else None,
        head=head,
        tied_head=tied,
        conv1d=layout.conv1d,
    )


def _generic(model: PreTrainedModel, path: str, blocks: list[Block]) -> Family:
    if len(blocks) < 2:
        raise UnsupportedModelError(
            f"{_kind(model)}: an unknown architecture with a single block; looked for two or more equal blocks, or for "
            f"one of {', '.join(KNOWN_FAMILIES)}. Use a model of that shape."
        )
    from torch import nn

    outside = [(name, module) for name, module in model.named_modules() if not name.startswith(f"{path}.")]
    norms = [name for name in _norms(model) if not name.startswith(f"{path}.")]
    head, tied = _head(model)
    return Family(
        name="generic",
        blocks=path,
        units=tuple(Unit(name, (name,), None) for name in blocks[0].linears),
        embeddings=tuple(name for name, module in outside if isinstance(module, nn.Embedding)),
        final_norm=norms[-1] if norms else None,
        head=head,
        tied_head=tied,
        conv1d=bool(blocks[0].conv1d),
    )


def _head(model: PreTrainedModel) -> tuple[str, bool]:
    """Full name of the output head, and whether its weight is the input embedding's."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if module is head]
    if head is None or not names:
        raise UnsupportedModelError(
            f"{_kind(model)}: no output head; looked for a causal language model that predicts the next token. "
            "Use its ForCausalLM checkpoint."
        )
    return names[0], head.weight is model.get_input_embeddings().weight
