"""The record of an architecture: everything that is particular to the models whose blocks are built alike.

Only data and questions about it, so that plan-time code can read it: neither torch nor Transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant_fairness_plugin.model.context import longest_input

Renamings = tuple[tuple[str, str], ...]
"""Parts of names, and what they become."""
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys of config.json for the number of layers; where a config has several, they must agree."""
OBSOLETE_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Names of tensors that old checkpoints hold and that models now compute themselves, as regular expressions."""


@dataclass(frozen=True, slots=True)
class FusionGroup:
    """Linear modules of a block that read the same tensor. Servers merge them, so they must share a precision."""

    name: str
    """`qkv`, `o`, `gate_up`, `down`, `fc_in`, `fc_out`; in an architecture without a record, the module's name."""
    modules: tuple[str, ...]
    """Names relative to the block, in the order in which servers concatenate them."""
    fused: str | None
    """The name of the merged module in servers, relative to the block; None where the module keeps its name."""
    routed: bool = False
    """Whether the modules are those of experts: each reads the tokens that are routed to it, and no two the same."""


@dataclass(frozen=True, slots=True)
class Fold:
    """The module of a block that the input scale of a fusion group is folded into."""

    unit: str
    """The fusion group whose weights are multiplied."""
    source: str
    """The norm or linear module that is divided, relative to the block."""
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies."""
    activated: bool = False
    """Whether an activation lies between the source and the group: then only some activations let a scale through."""
    heads: int = 0
    """Heads of the source where each is read by several heads of the group (grouped values; a norm of single heads,
    which has one); 0 where channels of both are the same."""
    also: tuple[str, ...] = ()
    """Linear modules outside of the group that read the source too, and must be multiplied with it."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """What blocks of one kind are made of. A model of a single kind has it in its record."""

    units: tuple[FusionGroup, ...]
    """Every linear module that can be quantized, each exactly once, in forward order."""
    folds: tuple[Fold, ...] = ()
    """Where AWQ's scales go; empty where nothing was proved to take them."""
    kept: tuple[tuple[str, str], ...] = ()
    """Linear modules that stay in 16 bit whatever a plan says, relative to the block, each with its reason."""


@dataclass(frozen=True, slots=True)
class ScaledActivation:
    """An activation that Transformers divides by `<activation>.scales` in every block of an AWQ model.

    Where the file has no such tensor, it leaves NaN there.
    """

    activation: str
    """Attribute of the module that calls it."""
    before: str
    """The linear module whose output it is given, an attribute of the same module."""


@dataclass(frozen=True, slots=True)
class Block:
    """The structure of one block as read from a model's modules or from the names and shapes of its tensors.

    Names are relative to the block.
    """

    linears: tuple[str, ...]
    conv1d: frozenset[str]
    """Linear modules that store their weight as `[in_features, out_features]`."""
    plain: frozenset[str]
    """Linear modules that store it as `[out_features, in_features]`. In headers, some modules can be either."""
    norms: frozenset[str]
    """Modules that hold only vectors."""
    biased: frozenset[str]
    """Linear modules with a bias."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the models of one or several families have in common: their blocks, and where the rest of the model is.

    What no fusion group lists stays in 16 bit.
    """

    families: tuple[str, ...]
    """Values of `model_type`. The first one also stands for other values with blocks of this structure; empty where
    the record was read from a model of which nothing else is known."""
    blocks: str
    """Full name of the list of decoder blocks."""
    units: tuple[FusionGroup, ...]
    """Every linear module of a block, each exactly once, in forward order."""
    norms: frozenset[str]
    embeddings: tuple[str, ...]
    """Full names; the first one is that of the tokens."""
    final_norm: str | None
    conv1d: bool = False
    """Whether linear modules store their weight as `[in_features, out_features]`."""
    biased: frozenset[str] | None = None
    """The modules that have a bias, where that is what tells the structure apart."""
    head: str = "lm_head"
    """Full name of the output head in Transformers."""
    head_on_disk: str | None = None
    """Its name in files and in servers, where Transformers renames it while loading."""
    tied_by_default: bool = False
    """Whether the head is the token embedding where config.json says nothing."""
    default_positions: int | None = None
    """The longest input where config.json says nothing; None where nothing bounds it."""
    folds: tuple[Fold, ...] = ()
    """Where AWQ's scales go; empty where that is not known."""
    scaled_activation: ScaledActivation | None = None
    moved: Renamings = ()
    """Whole parts of names in Transformers, and what files and servers call them instead."""
    gguf_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Module of a block → llama.cpp's name of its weight in `blk.<layer>.<name>.weight`; empty where not known."""
    static_cache: bool = True
    """False where positions are read off the length of the keys, which in a static cache is that of the cache."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all linear modules of a block, in forward order."""
        return tuple(module for unit in self.units for module in unit.modules)

    @property
    def structure(self) -> tuple[object, ...]:
        """What `matches` compares: records that are equal in it differ only in what their modules compute."""
        return self.blocks, frozenset(self.modules), self.norms, self.conv1d, self.biased

    def matches(self, block: Block) -> bool:
        """Return whether a block is built as this architecture's are."""
        return (
            frozenset(block.linears) == frozenset(self.modules)
            and not (block.plain if self.conv1d else block.conv1d)
            and block.norms == self.norms
            and self.biased in (None, block.biased)
        )

    def family_name(self, model_type: str) -> str:
        """Return `model_type` where it is one of the families, else the first of them."""
        return model_type if model_type in self.families else self.families[0]

    def stored_name(self, name: str) -> str:
        """Return the name in files and servers of a module or tensor of the loaded model."""
        return _renamed(moved_name(name, self.moved), self.head, self.head_on_disk or self.head)

    def loaded_name(self, name: str) -> str:
        """Return the name in the loaded model of a module or tensor of the files. The inverse of `stored_name`."""
        back = moved_name(name, turned_round(self.moved))
        return _renamed(back, self.head_on_disk or self.head, self.head)

    def longest_input(self, config: Mapping[str, Any]) -> int:
        """Return how many tokens a model takes, by its config; `sys.maxsize` where nothing bounds them."""
        return longest_input(config, self.default_positions)


def moved_name(name: str, moved: Renamings) -> str:
    """Return a name with whole parts of it, between dots, changed to others; the same name where none of them is in it.

    Args:
        name: of a module or tensor.
        moved: parts, one or several with dots between them, and what they become; where two begin alike, the first
            counts.
    """
    parts, result = name.split("."), list[str]()
    while parts:
        found = (pair for pair in moved if parts[: pair[0].count(".") + 1] == pair[0].split("."))
        old, new = next(found, (parts[0], parts[0]))
        result.append(new)
        parts = parts[old.count(".") + 1 :]
    return ".".join(result)


def turned_round(moved: Renamings) -> Renamings:
    """Return the way back of renamings."""
    return tuple((new, old) for old, new in moved)


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name == old or name.startswith(f"{old}.") else name
