"""The map of one model: its architecture's record, its head, and whether that is tied.

An architecture is recognised by structure: which linear and norm modules the blocks hold, under which names. Class
names are never read; `config.model_type` only picks between families of the same structure. An architecture without a
record is traced (`tracing`). Importing this module does not import torch; `detect_family` does, when it is called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import (
    Architecture,
    Block,
    BlockKind,
    FusionGroup,
    known_families,
    match_architecture,
)
from quant_fairness_plugin.model.architectures.experts import (
    expert_counts,
    find_mixture,
    mixture_advice,
    mixture_kind,
    names_experts,
)
from quant_fairness_plugin.model.wrapper import Wrapper, find_wrapper

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

GENERIC = "generic"
"""The name of a family whose architecture has no record and cannot be traced."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Family:
    """The map of a model. What holds for its whole architecture is in the record."""

    name: str
    """One of the record's families; the `model_type` of a traced architecture; or `generic`."""
    architecture: Architecture
    """The record, with the head and the final norm that this model has."""
    tied_head: bool
    """Whether the head's weight is the input embedding's."""
    kinds: tuple[BlockKind, ...] = ()
    """What each layer is made of, one entry a layer; empty where all are as the record says."""
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
        """Whether the fusion groups are not known: then only whole layers can be protected."""
        return self.name == GENERIC

    @property
    def blocks(self) -> str:
        """Full name of the list of decoder blocks."""
        return self.architecture.blocks

    @property
    def units(self) -> tuple[FusionGroup, ...]:
        """One fusion group of every name that some layer has, in forward order; those of one layer: `units_of`."""
        return self.architecture.units

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The names that fusion groups of some layer have, in forward order."""
        return tuple(unit.name for unit in self.architecture.units)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Full names of the embeddings; the first one is that of the tokens."""
        return self.architecture.embeddings

    def table_shapes(self, shapes: Mapping[str, Sequence[int]]) -> list[tuple[int, int]]:
        """Return rows and columns of the embedding of the tokens, and of a head of its own.

        Args:
            shapes: of the model's parameters.
        """
        names = [f"{self.embeddings[0]}.weight", *([] if self.tied_head else [f"{self.head}.weight"])]
        return [(shapes[name][0], shapes[name][1]) for name in names]

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
        """Return a layer's fusion groups, in forward order: what can be quantized, each module exactly once.

        Whatever works on one layer asks here, not `units`: layers of hybrids differ.
        """
        return self.kind_of(layer).units

    def kind_of(self, layer: int) -> BlockKind:
        """Return what a layer is made of."""
        return self.kinds[layer] if self.kinds else BlockKind(self.architecture.units, self.architecture.folds)

    def kept(self, layer: int) -> dict[str, str]:
        """Return full name of each linear module of a layer that always stays in 16 bit → the reason."""
        return {f"{self.blocks}.{layer}.{module}": reason for module, reason in self.kind_of(layer).kept}

    def modules(self, layer: int) -> tuple[str, ...]:
        """Return the names of a layer's linear modules that can be quantized, relative to the block, in order."""
        return tuple(module for unit in self.units_of(layer) for module in unit.modules)

    def full_names(self, layer: int) -> tuple[str, ...]:
        """Return the full names of a layer's linear modules that can be quantized, in forward order."""
        return tuple(f"{self.blocks}.{layer}.{module}" for module in self.modules(layer))

    def fused_modules(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Return full name of a merged module in servers → full names of its parts; empty where nothing is merged."""
        prefix = f"{self.blocks}.{layer}."
        return {
            prefix + unit.fused: tuple(prefix + module for module in unit.modules)
            for unit in self.units_of(layer)
            if unit.fused is not None
        }


def detect_family(model: PreTrainedModel) -> Family:
    """Return the map of a model, read from the modules that it is made of. The model may live on the meta device.

    Returns:
        A known family; else what tracing a small random model of the architecture shows, under its `model_type`; else,
        where that cannot be run, one named `generic`: then every linear module of a block is a unit, all blocks must be
        equal, and there are two or more.

    Raises:
        UnsupportedModelError: no output head, experts, adapters, blocks that share weights, an encoder, or no list of
            blocks; blocks that differ and cannot be traced; says what is expected.
    """
    from quant_fairness_plugin.model.structure import block_structure

    wrapper = find_wrapper(model)
    path, blocks = _block_list(model, wrapper)
    _refuse_adapters_and_experts(model, path, blocks)
    structures = [block_structure(block) for block in blocks]
    if find_mixture(_kind(model)) is not None and any(experts := [_unfolded(block) for block in blocks]):
        return replace(_mixture(model, path, structures, experts, wrapper), wrapper=wrapper)
    alike = len(set(structures)) == 1
    record = match_architecture(lambda record: structures[0] if alike and record.blocks == path else None, _kind(model))
    if record is not None and _kind(model) in record.families:
        return replace(_known(model, record), wrapper=wrapper)
    kinds, reason = _trace(model, path, wrapper)
    if record is not None and _has_embeddings(model, record):
        family = _known(model, record)
        # The record knows the names; what the norms and activations compute, only tracing tells.
        if kinds is not None and all(set(kind.units) == set(record.units) for kind in kinds):
            family = replace(family, kinds=kinds)
    elif kinds is not None:
        family = _traced(_read_off(model, path, structures, _kind(model), wrapper), kinds)
    else:
        _check_generic(model, path, structures, reason)
        family = _read_off(model, path, structures, GENERIC, wrapper)
    return replace(family, wrapper=wrapper)


def _trace(model: PreTrainedModel, path: str, wrapper: Wrapper | None) -> tuple[tuple[BlockKind, ...] | None, str]:
    """Return what tracing shows of every layer, or None with the reason why it shows nothing."""
    text: Any = model if wrapper is None else model.get_submodule(wrapper.decoder)
    if not hasattr(getattr(text, "config", None), "to_dict"):
        return None, "it has no config, by which a small model could be built"
    from quant_fairness_plugin.model.tracing import trace_blocks

    try:
        return trace_blocks(text, path if wrapper is None else path.removeprefix(f"{wrapper.decoder}.")), ""
    except UnsupportedModelError as err:
        _logger.info("%s: %s", _kind(model), err)
        return None, str(err)


def _check_generic(model: nn.Module, path: str, structures: list[Block], reason: str) -> None:
    other = next((i for i, structure in enumerate(structures) if structure != structures[0]), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks 0 and {other} of {path} hold different modules, and {reason}; expected a list of "
            f"equal decoder blocks. Supported are {', '.join(known_families())} and models of that shape."
        )
    if len(structures) < 2:
        raise UnsupportedModelError(
            f"{_kind(model)}: an unknown architecture with a single block, and {reason}; expected two or more equal "
            f"blocks, or one of {', '.join(known_families())}. Use a model of that shape."
        )


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)


def _block_list(model: nn.Module, wrapper: Wrapper | None) -> tuple[str, list[nn.Module]]:
    """Return full name and members of the text model's only outermost `ModuleList` of modules with linear ones."""
    from torch import nn

    from quant_fairness_plugin.model.structure import linears

    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if wrapper is not None and not wrapper.owns(name):
            continue
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in linears(module)):
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
    weights = [id(module.weight) for block in blocks for _, module in linears(block)]
    if len(set(weights)) != len(weights):
        raise UnsupportedModelError(
            f"{_kind(model)}: blocks of {path} share weights, so that one layer cannot be protected alone. "
            f"{expected}; use a model in which every block has weights for itself."
        )
    return path, list(blocks)


def _refuse_adapters_and_experts(model: nn.Module, path: str, blocks: list[nn.Module]) -> None:
    mixture: list[str] = []
    others: dict[str, str] = {}
    for i, block in enumerate(blocks):
        taken = bool(_unfolded(block))
        for name, module in block.named_modules():
            if any(part.startswith("lora_") for part in name.split(".")):
                raise UnsupportedModelError(
                    f"{_kind(model)}: {path}.{i}.{name} is an unmerged LoRA adapter; plain models are accepted. "
                    "Merge it first (peft's merge_and_unload)."
                )
            if names_experts(name) and not taken:
                mixture.append(f"{path}.{i}.{name}")
            elif reason := _not_dense(module):
                others[f"{path}.{i}.{name}"] = reason
    counted = any(True for _ in expert_counts(_config(model)))
    if mixture or (counted and others):
        where = next((name for name in mixture if name.endswith(".experts")), [*mixture, *others][0])
        advice = mixture_advice(_kind(model))
        raise UnsupportedModelError(f"{_kind(model)}: {where} holds a mixture of experts, {advice}")
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

    from quant_fairness_plugin.model.structure import linears

    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not convolution and any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
        return "stacks several matrices in one tensor"
    if isinstance(module, nn.ModuleList) and sum(any(True for _ in linears(member)) for member in module) > 1:
        return "is a list of several modules"
    # No dense block looks anything up.
    return "is a table that tokens look rows up in" if isinstance(module, nn.Embedding) else ""


def _has_embeddings(model: nn.Module, record: Architecture) -> bool:
    return {name for name, _ in model.named_modules()}.issuperset(record.embeddings)


def _known(model: PreTrainedModel, record: Architecture) -> Family:
    present = {name for name, _ in model.named_modules()}
    if not _has_embeddings(model, record):
        missing = [name for name in record.embeddings if name not in present]
        raise UnsupportedModelError(
            f"{_kind(model)}: the blocks are those of {record.families[0]}, but {missing[0]} is missing; expected "
            f"{', '.join(record.embeddings)}. Use a model with the embeddings of its family."
        )
    head, tied = _head(model)
    final_norm = record.final_norm if record.final_norm in present else None
    return Family(record.family_name(_kind(model)), replace(record, head=head, final_norm=final_norm), tied)


def _read_off(model: PreTrainedModel, path: str, blocks: list[Block], name: str, wrapper: Wrapper | None) -> Family:
    """Return the map of an architecture without a record, of which so far only the modules are known."""
    from torch import nn

    from quant_fairness_plugin.model.structure import norms

    own = [(name, module) for name, module in model.named_modules() if wrapper is None or wrapper.owns(name)]
    outside = [(name, module) for name, module in own if not name.startswith(f"{path}.")]
    after = [name for name in norms(model) if name in dict(outside)]
    head, tied = _head(model)
    record = Architecture(
        families=() if name == GENERIC else (name,),
        blocks=path,
        units=tuple(FusionGroup(name, (name,), None) for name in blocks[0].linears),
        norms=blocks[0].norms,
        embeddings=tuple(name for name, module in outside if isinstance(module, nn.Embedding)),
        final_norm=after[-1] if after else None,
        conv1d=bool(blocks[0].conv1d),
        head=head,
    )
    return Family(name, record, tied)


def _traced(family: Family, kinds: tuple[BlockKind, ...]) -> Family:
    """Return the map with what tracing found: of every layer, and one group of every name for the whole."""
    groups = {unit.name: unit for kind in reversed(kinds) for unit in reversed(kind.units)}
    order = dict.fromkeys(unit.name for kind in kinds for unit in kind.units)
    record = replace(family.architecture, units=tuple(groups[name] for name in order))
    return replace(family, architecture=record, kinds=kinds)


def _unfolded(block: nn.Module) -> str:
    """Return the name of the routed experts of a block, relative to it; empty where it has none."""
    from quant_fairness_plugin.model.experts import expert_modules

    return next((name for name, _ in expert_modules(block)), "")


def _mixture(
    model: PreTrainedModel, path: str, blocks: list[Block], experts: list[str], wrapper: Wrapper | None
) -> Family:
    """Return the map of a model with unfolded experts; some of its layers may have none."""
    from quant_fairness_plugin.model.tracing.steering import head_counts, without_steering

    mixture = find_mixture(_kind(model))
    assert mixture is not None, "experts are unfolded in families that are taken only"
    text: Any = model if wrapper is None else model.get_submodule(wrapper.decoder)
    heads, kinds = head_counts(text), []
    for layer, (block, name) in enumerate(zip(blocks, experts, strict=True)):
        kind = mixture_kind(block.linears, name)
        dense = frozenset(module for unit in kind.units if not unit.routed for module in unit.modules)
        kinds.append(without_steering(kind, dense, model.get_submodule(f"{path}.{layer}"), heads))
    family = _traced(_read_off(model, path, blocks, _kind(model), wrapper), tuple(kinds))
    return replace(family, architecture=replace(family.architecture, moved=mixture.moved))


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
