"""Which linear modules of a model are quantized, and under which names files and readers know them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from quant_fairness_plugin.checkpoint.experts import expert_target, skipped_patterns
from quant_fairness_plugin.checkpoint.refusals import STORED_BITS
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.families import Family

if TYPE_CHECKING:
    from torch import nn

NO_WIDTHS: Mapping[str, int] = MappingProxyType({})


def stored_name(name: str, family: Family) -> str:
    """Return the name that checkpoints of a family use for a module or tensor of the loaded model."""
    return family.stored_name(name)


def module_map(
    model: nn.Module,
    family: Family,
    quantized: Iterable[str],
    *,
    bits: Mapping[str, int] = NO_WIDTHS,
    sizes: Mapping[str, int] = NO_WIDTHS,
    unread: Iterable[str] = (),
) -> ModuleMap:
    """Sort a model's linear modules into quantized and 16-bit ones. The model may live on the meta device.

    Args:
        model: the 16-bit model.
        family: its map.
        quantized: full names of the quantized modules, in any order.
        bits: those of them that have other bits than 4, with their bits.
        sizes: group sizes of the quantized modules, where they are known.
        unread: outermost names in files of tensors that no module of the model has.
    """
    from quant_fairness_plugin.model.linear import is_linear  # torch, which plan-time code does without

    done = set(quantized)
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    kept = [name for name in linears if name not in done]
    renamed = {name: family.stored_name(name) for name in linears if family.owns(name)}
    layers = len(model.get_submodule(family.blocks))  # type: ignore[arg-type] # a ModuleList, says the family
    return ModuleMap(
        blocks=family.blocks,
        quantized=tuple(name for name in linears if name in done),
        kept=tuple(kept),
        fused={name: parts for layer in range(layers) for name, parts in family.fused_modules(layer).items()},
        bits={name: bits[name] for name in linears if name in bits},
        sizes={name: sizes[name] for name in linears if name in sizes},
        renamed={name: stored for name, stored in renamed.items() if name != stored},
        parts=() if family.wrapper is None else family.wrapper.parts,
        unread=tuple(unread),
        routed=skipped_patterns(model, done),
        experts=expert_target(model, done),
    )


def own_widths(bits: Mapping[str, int]) -> dict[str, int]:
    """Return those modules of `bits` (module → bits) that have other bits than most checkpoints; see `module_map`."""
    return {name: width for name, width in bits.items() if width != STORED_BITS}


def activation_scales(model: nn.Module) -> dict[str, int]:
    """Return the tensors that Transformers wants in an `awq` file beside the model's own: full name → length.

    Its AWQ integration divides some activations by scales, in every block, quantized or not. Ours are ones.

    Args:
        model: the unquantized model, on any device.
    """
    from quant_fairness_plugin.model.linear import linear_weight  # torch, see `module_map`

    architecture = find_architecture(str(getattr(model.config, "model_type", "")))
    scaled = None if architecture is None else architecture.scaled_activation
    if scaled is None:
        return {}
    return {
        f"{name}.{scaled.activation}.scales": len(linear_weight(getattr(module, scaled.before)))
        for name, module in model.named_modules()
        if hasattr(module, scaled.activation) and hasattr(module, scaled.before)
    }


@dataclass(frozen=True, slots=True)
class ModuleMap:
    """Which linear modules of a model are quantized, under every name that a loader may ask for. Full names only."""

    blocks: str
    """Full name of the list of decoder blocks."""
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    """Every other linear module of the model, the head included."""
    fused: Mapping[str, tuple[str, ...]]
    """Name of a module that servers merge → the modules that it is merged from."""
    bits: Mapping[str, int] = field(default_factory=dict)
    """Quantized module → bits, where they are not 4 (INT8 units, FP8)."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Quantized module → input channels that share a scale (-1: all); empty where that is not known."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Module → its name in files, where that is another one, such as GPT-NeoX's `embed_out`. Servers know that name."""
    parts: tuple[str, ...] = ()
    """Modules that are not text, such as a vision tower; no linear module in them is quantized."""
    unread: tuple[str, ...] = ()
    """Outermost names in files of tensors that no module of the model has."""
    routed: tuple[str, ...] = ()
    """Of a mixture of experts: regular expressions, after `re:`, for its routers and the experts in 16 bit."""
    experts: str | None = None
    """The regular expression for all routed experts, where some are quantized."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """What a list of all that stays in 16 bit holds: full names, and patterns in the place of experts' names."""
        rules = [re.compile(pattern.removeprefix("re:")) for pattern in self.routed]

        def single(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(name for name in names if not any(rule.match(name) for rule in rules))

        patterns = (f"re:{pattern}" for pattern in self.patterns)
        return (*single(self.kept_text), *single(self.aliases), *patterns, *self.routed)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names under which servers know kept modules."""
        return tuple(self.renamed[name] for name in self.kept if name in self.renamed)

    @property
    def kept_text(self) -> tuple[str, ...]:
        """Kept modules of the text model."""
        return tuple(name for name in self.kept if not any(name.startswith(f"{part}.") for part in self.parts))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions for all that is not in the decoder blocks of a model with several parts.

        Servers call a vision tower `visual.…` or `model.visual.…` and merge modules in it, and put the head into the
        text decoder.
        """
        outside = [name for name in self.kept_text if not name.startswith(f"{self.blocks}.")] if self.parts else []
        parts = [rf"(.*\.)?{re.escape(part.rpartition('.')[2])}(\..*)?$" for part in (*self.parts, *outside)]
        return (*parts, *(rf"{re.escape(name)}(\..*)?$" for name in self.unread))

    @property
    def views(self) -> tuple[ModuleMap, ...]:
        """The modules under every set of names that readers may know them by: in memory, and in files.

        Where only the head has another name, `aliases` holds it.
        """
        return (self, self.on_disk) if self.parts else (self,)

    @property
    def on_disk(self) -> ModuleMap:
        """The same modules under their names in files, which are those of servers."""

        def stored(name: str) -> str:
            return self.renamed.get(name, name)

        first, *_ = (*self.quantized, *self.kept_in_blocks)
        ending = first.removeprefix(self.blocks)
        blocks = stored(first).removesuffix(ending)
        fused = {
            blocks + name.removeprefix(self.blocks): tuple(map(stored, parts)) for name, parts in self.fused.items()
        }
        return replace(
            self,
            blocks=blocks,
            quantized=tuple(map(stored, self.quantized)),
            kept=tuple(map(stored, self.kept)),
            fused=fused,
            bits={stored(name): bits for name, bits in self.bits.items()},
            sizes={stored(name): size for name, size in self.sizes.items()},
            renamed={},
        )

    def usual_size(self, default: int) -> int:
        """Return the group size of most modules of the grid's own bits; the default where there are none."""
        sizes = Counter(size for name, size in self.sizes.items() if name not in self.bits)
        return max(sizes, key=lambda size: (sizes[size], size), default=default)

    @property
    def kept_in_blocks(self) -> tuple[str, ...]:
        """Kept modules of the decoder blocks, without the head."""
        return tuple(name for name in self.kept if name.startswith(f"{self.blocks}."))

    @property
    def split_groups(self) -> tuple[str, ...]:
        """Merged modules whose parts differ in bits (16, 8 or the grid's) or group size: no server can load these."""
        widths = dict.fromkeys(self.kept, 16) | dict(self.bits)

        def schemes(parts: tuple[str, ...]) -> set[tuple[int, int]]:
            return {(widths.get(part, 0), self.sizes.get(part, 0)) for part in parts}

        return tuple(name for name, parts in self.fused.items() if len(schemes(parts)) > 1)

    @property
    def kept_fused(self) -> tuple[str, ...]:
        """Merged modules of which all parts are kept."""
        kept = set(self.kept)
        return tuple(name for name, parts in self.fused.items() if kept.issuperset(parts))

    @property
    def kept_layers(self) -> tuple[str, ...]:
        """Full names of the blocks in which nothing is quantized, in order."""
        busy = {self._layer(name) for name in self.quantized}
        layers = dict.fromkeys(self._layer(name) for name in self.kept_in_blocks)
        return tuple(name for name in layers if name not in busy)

    def _layer(self, module: str) -> str:
        index = module.removeprefix(f"{self.blocks}.").partition(".")[0]
        return f"{self.blocks}.{index}"
