"""The map of one model: its architecture's record, its head, and whether that is tied.

An architecture is recognised by structure: which linear and norm modules the blocks hold, under which names. Class
names are never read; `config.model_type` only picks between families of the same structure. Importing this module
does not import torch; `detect_family` does, when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import (
    Architecture,
    Block,
    FusionGroup,
    known_families,
    match_architecture,
)
from quant_fairness_plugin.model.architectures.experts import MIXTURE_ADVICE, expert_counts, names_experts
from quant_fairness_plugin.model.wrapper import Wrapper, find_wrapper

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

GENERIC = "generic"
"""The name of a family whose architecture has no record."""


@dataclass(frozen=True, slots=True)
class Family:
    """The map of a model. What holds for its whole architecture is in the record."""

    name: str
    """One of the record's families, or `generic`."""
    architecture: Architecture
    """The record, with the head and the final norm that this model has."""
    tied_head: bool
    """Whether the head's weight is the input embedding's."""
    wrapper: Wrapper | None = None
    """Where the text decoder and the other parts are; None where the whole model is text."""

    def stored_name(self, name: str) -> str:
        """Return the name in files and servers of a module or tensor of the text model."""
        return self.architecture.stored_name(name) if self.wrapper is None else self.wrapper.stored_name(name)

    def loaded_name(self, name: str) -> str:
        """Return the name in the loaded model of a module or tensor of the files. The inverse of `stored_name`."""
        return self.architecture.loaded_name(name) if self.wrapper is None else self.wrapper.loaded_name(name)

    def owns(self, name: str) -> bool:
        """Return whether a module or tensor of the loaded model belongs to the text model."""
        return self.wrapper is None or self.wrapper.owns(name)

    @property
    def generic(self) -> bool:
        """Whether the architecture has no record: only whole layers can be protected; fused names are not known."""
        return self.name == GENERIC

    @property
    def blocks(self) -> str:
        """Full name of the list of decoder blocks."""
        return self.architecture.blocks

    @property
    def units(self) -> tuple[FusionGroup, ...]:
        """The fusion groups of every layer, in forward order; all layers are alike today (see `units_of`)."""
        return self.architecture.units

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Full names of the embeddings; the first one is that of the tokens."""
        return self.architecture.embeddings

    @property
    def final_norm(self) -> str | None:
        """Full name of the norm after the last block; None where the model has none."""
        return self.architecture.final_norm

    @property
    def head(self) -> str:
        """Full name of the output head in the loaded model."""
        return self.architecture.head

    @property
    def conv1d(self) -> bool:
        """Whether linear modules of blocks store their weight as `[in_features, out_features]`."""
        return self.architecture.conv1d

    def units_of(self, layer: int) -> tuple[FusionGroup, ...]:
        """Return a layer's fusion groups, in forward order: every linear module of the block, each exactly once.

        Whatever works on one layer asks here, not `units`, so that layers may come to differ.
        """
        return self.units

    def modules(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's linear modules, relative to the block, in forward order."""
        return tuple(module for unit in self.units_of(layer) for module in unit.modules)

    def full_names(self, layer: int) -> tuple[str, ...]:
        """Return the full names of a layer's linear modules, in forward order."""
        return tuple(f"{self.blocks}.{layer}.{module}" for module in self.modules(layer))

    def fused_modules(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Return full name of a merged module in servers → full names of its parts; empty where nothing is merged."""
        prefix = f"{self.blocks}.{layer}."
        return {
            prefix + unit.fused: tuple(prefix + module for module in unit.modules)
            for unit in self.units_of(layer)
            if unit.fused is not None
        }

    def fused_names(self, layer: int) -> tuple[str, ...]:
        """Return the full names under which servers know a layer's merged modules."""
        return tuple(self.fused_modules(layer))


def detect_family(model: PreTrainedModel) -> Family:
    """Return the map of a model, read from the modules that it is made of. The model may live on the meta device.

    Returns:
        A known family, or one named `generic` for an architecture without a record that has exactly one list of two or
        more equal blocks: every linear module of a block is then a unit.

    Raises:
        UnsupportedModelError: no output head, experts, adapters, blocks that differ or share weights, an encoder, or
            no list of blocks; says what is expected.
    """
    wrapper = find_wrapper(model)
    path, blocks = _block_list(model, wrapper)
    _refuse_adapters_and_experts(model, path, blocks)
    structures = [_structure(block) for block in blocks]
    if len(set(structures)) > 1:
        other = next(i for i, structure in enumerate(structures) if structure != structures[0])
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks 0 and {other} of {path} hold different modules; expected a list of equal "
            f"decoder blocks. Supported are {', '.join(known_families())} and models of that shape."
        )
    record = match_architecture(lambda record: structures[0] if record.blocks == path else None, _kind(model))
    family = _generic(model, path, structures, wrapper) if record is None else _known(model, record)
    return replace(family, wrapper=wrapper)


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def _block_list(model: nn.Module, wrapper: Wrapper | None) -> tuple[str, list[nn.Module]]:
    """Return full name and members of the text model's only outermost `ModuleList` of modules with linear ones."""
    from torch import nn

    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if wrapper is not None and not wrapper.owns(name):
            continue
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in _linears(module)):
            lists[name] = module
    expected = f"Expected one list of decoder blocks, as in {', '.join(known_families())}"
    if len(lists) != 1:
        problem = f"several lists of blocks ({', '.join(lists)})" if lists else "no list of blocks with linear modules"
        raise UnsupportedModelError(f"{_kind(model)}: {problem}. {expected}; use a decoder-only model of that shape.")
    [(path, blocks)] = lists.items()
    if "encoder" in path.split("."):
        raise UnsupportedModelError(
            f"{_kind(model)}: the blocks at {path} are an encoder's. {expected}; use such a model."
        )
    weights = [id(module.weight) for block in blocks for _, module in _linears(block)]
    if len(set(weights)) != len(weights):
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks of {path} share weights, so that one layer cannot be protected alone. "
            f"{expected}; use a model in which every block has weights for itself."
        )
    return path, list(blocks)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    from quant_fairness_plugin.model.linear import is_linear

    return ((name, child) for name, child in module.named_modules() if is_linear(child))


def _refuse_adapters_and_experts(model: nn.Module, path: str, blocks: list[nn.Module]) -> None:
    mixture: list[str] = []
    others: dict[str, str] = {}
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            if any(part.startswith("lora_") for part in name.split(".")):
                raise UnsupportedModelError(
                    f"{_kind(model)}: {path}.{i}.{name} is an unmerged LoRA adapter; plain models are accepted. "
                    "Merge it first (peft's merge_and_unload)."
                )
            if names_experts(name):
                mixture.append(f"{path}.{i}.{name}")
            elif reason := _not_dense(module):
                others[f"{path}.{i}.{name}"] = reason
    counted = any(True for _ in expert_counts(_config(model)))
    if mixture or (counted and others):
        where = next((name for name in mixture if name.endswith(".experts")), [*mixture, *others][0])
        raise UnsupportedModelError(f"{_kind(model)}: {where} holds a mixture of experts, {MIXTURE_ADVICE}")
    for name, reason in others.items():
        raise UnsupportedModelError(
            f"{_kind(model)}: {name} {reason}, which would stay as it is; expected blocks of linear modules and norms. "
            f"Use a model of the shape of {', '.join(known_families())}."
        )


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return {} if config is None else dict(config.to_dict())


def _not_dense(module: nn.Module) -> str:
    """Return what a module of a block holds that no dense block has; empty where nothing.

    Quantized as dense blocks, such ones would keep a part of their weights as it is, or run what no calibration saw.
    """
    from torch import nn

    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not convolution and any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
        return "stacks several matrices in one tensor"
    if isinstance(module, nn.ModuleList) and sum(any(True for _ in _linears(member)) for member in module) > 1:
        return "is a list of several modules"
    # No dense block looks anything up.
    return "is a table that tokens look rows up in" if isinstance(module, nn.Embedding) else ""


def _structure(block: nn.Module) -> Block:
    from quant_fairness_plugin.model.linear import is_conv1d

    linears = dict(_linears(block))
    conv1d = frozenset(name for name, module in linears.items() if is_conv1d(module))
    return Block(
        linears=tuple(linears),
        conv1d=conv1d,
        plain=frozenset(linears) - conv1d,
        norms=frozenset(_norms(block)),
        biased=frozenset(name for name, module in linears.items() if module.bias is not None),
    )


def _norms(module: nn.Module) -> Iterator[str]:
    """Yield the names of the modules that hold only vectors: layer norms of every kind."""
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if parameters and all(p.dim() == 1 for p in parameters):
            yield name


def _known(model: PreTrainedModel, record: Architecture) -> Family:
    present = {name for name, _ in model.named_modules()}
    missing = [name for name in record.embeddings if name not in present]
    if missing:
        raise UnsupportedModelError(
            f"{_kind(model)}: the blocks are those of {record.families[0]}, but {missing[0]} is missing; expected "
            f"{', '.join(record.embeddings)}. Use a model with the embeddings of its family."
        )
    head, tied = _head(model)
    final_norm = record.final_norm if record.final_norm in present else None
    return Family(record.family_name(_kind(model)), replace(record, head=head, final_norm=final_norm), tied)


def _generic(model: PreTrainedModel, path: str, blocks: list[Block], wrapper: Wrapper | None) -> Family:
    if len(blocks) < 2:
        raise UnsupportedModelError(
            f"{_kind(model)}: an unknown architecture with a single block; expected two or more equal blocks, or "
            f"one of {', '.join(known_families())}. Use a model of that shape."
        )
    from torch import nn

    own = [(name, module) for name, module in model.named_modules() if wrapper is None or wrapper.owns(name)]
    outside = [(name, module) for name, module in own if not name.startswith(f"{path}.")]
    norms = [name for name in _norms(model) if name in dict(outside)]
    head, tied = _head(model)
    record = Architecture(
        families=(),
        blocks=path,
        units=tuple(FusionGroup(name, (name,), None) for name in blocks[0].linears),
        norms=blocks[0].norms,
        embeddings=tuple(name for name, module in outside if isinstance(module, nn.Embedding)),
        final_norm=norms[-1] if norms else None,
        conv1d=bool(blocks[0].conv1d),
        head=head,
    )
    return Family(GENERIC, record, tied)


def _head(model: PreTrainedModel) -> tuple[str, bool]:
    """Return the full name of the output head, and whether its weight is the input embedding's."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [name for name, module in model.named_modules() if module is head]
    if head is None or not names:
        raise UnsupportedModelError(
            f"{_kind(model)}: no output head; expected a causal language model that predicts the next token. "
            "Use its ForCausalLM checkpoint."
        )
    return names[0], head.weight is model.get_input_embeddings().weight
