"""Step 1, outline: a model's map and the shapes of its parameters, without the model. From its config and headers.

The supported families are recognised by the names and shapes of their tensors, which needs neither torch nor
Transformers; any other architecture is built on the meta device, which takes no memory but some seconds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from quant_fairness_plugin.model.architectures import LAYOUTS, Layout
from quant_fairness_plugin.model.families import Block, Family, detect_family
from quant_fairness_plugin.model.headers import TensorShapes
from quant_fairness_plugin.model.resolve import ModelFiles, tensor_shapes

Sizes = tuple[int, ...]

_HEAD = "lm_head"
_HEAD_ON_DISK = "embed_out"
"""What checkpoints of GPT-NeoX call the head; Transformers renames it while loading."""
_TIED_BY_DEFAULT = frozenset({"gemma", "opt", "gpt2", "bloom"})
"""Families whose config class ties the head where config.json says nothing."""
_POSITION_KEYS = ("max_position_embeddings", "n_positions")
_GPT2_POSITIONS = 1024
"""What Transformers takes where the config of a GPT-2 says nothing."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A model without its weights."""

    family: Family
    layers: int
    shapes: Mapping[str, Sizes]
    """Parameter → shape as the model stores it. A tied head is not listed, as it is the embedding's."""
    positions: int
    """The longest input; `sys.maxsize` where nothing bounds it."""

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; tied ones count once."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return self.matrix(f"{self.family.blocks}.0.{self.family.units[0].modules[0]}")[1]

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        tied = f"{self.family.embeddings[0]}.weight"
        return self.shapes.get(f"{self.family.head}.weight", self.shapes.get(tied, (0,)))[0]

    def matrix(self, module: str) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of a linear module of a block."""
        first, second = self.shapes[f"{module}.weight"]
        return (second, first) if self.family.conv1d else (first, second)


def outline_model(files: ModelFiles, *, trust_remote_code: bool = False) -> Outline:
    """The outline of a model, from its config and the headers of its files. No weight is read.

    Raises:
        UnsupportedModelError: an architecture that is not supported.
        ArtifactError: pickled weights, or files that are malformed.
    """
    shapes = tensor_shapes(files)
    for layout in LAYOUTS:
        named = _with_prefix(shapes, layout)
        if named is not None and _block(named, layout).fits(layout):
            return _known(files, layout, named)
    return _built(files, trust_remote_code)


def _with_prefix(shapes: TensorShapes, layout: Layout) -> dict[str, Sizes] | None:
    """The tensors under the names of the whole model, or None where they are not in this layout.

    Checkpoints of a model without its head (such as GPT-2's own) leave out the first part of every name.
    """
    prefix, _, rest = layout.blocks.partition(".")
    plain = {name: shape for name, (_, shape) in shapes.items()}
    if any(name.startswith(f"{layout.blocks}.0.") for name in plain):
        return plain
    if any(name.startswith(f"{rest}.0.") for name in plain):
        return {name if name.startswith(_HEAD) else f"{prefix}.{name}": shape for name, shape in plain.items()}
    return None


def _block(shapes: Mapping[str, Sizes], layout: Layout) -> Block:
    """The structure of the first block, read off its tensors."""
    modules: dict[str, dict[str, Sizes]] = {}
    for name, shape in _parameters(shapes):
        if name.startswith(f"{layout.blocks}.0."):
            module, _, kind = name.removeprefix(f"{layout.blocks}.0.").rpartition(".")
            modules.setdefault(module, {})[kind] = shape
    linears = tuple(name for name, own in modules.items() if len(own.get("weight", ())) == 2)
    vectors = {name for name, own in modules.items() if all(len(shape) == 1 for shape in own.values())}
    return Block(
        linears=linears,
        # Which way round a weight is stored cannot be seen; GPT-2's names are its own.
        conv1d=frozenset(linears) if layout.conv1d else frozenset(),
        norms=frozenset(vectors),
        biased=frozenset(name for name in linears if "bias" in modules[name]),
    )


def _parameters(shapes: Mapping[str, Sizes]) -> Iterator[tuple[str, Sizes]]:
    """Without the buffers that old checkpoints hold: rotary tables, GPT-2's masks (`attn.bias`, four dimensions)."""
    for name, shape in shapes.items():
        if name.endswith((".weight", ".bias")) and 1 <= len(shape) <= 2:
            yield name, shape


def _known(files: ModelFiles, layout: Layout, named: Mapping[str, Sizes]) -> Outline:
    kind = str(files.config.get("model_type", ""))
    shapes = {_in_memory(name): shape for name, shape in _parameters(named)}
    head = f"{_HEAD}.weight"
    name = kind if kind in layout.families else layout.families[0]
    tied = head not in shapes or bool(files.config.get("tie_word_embeddings", name in _TIED_BY_DEFAULT))
    if tied:
        shapes.pop(head, None)
    present = {name.rpartition(".")[0] for name in shapes}
    family = Family(
        name=name,
        blocks=layout.blocks,
        units=layout.units,
        embeddings=layout.embeddings,
        final_norm=layout.final_norm if layout.final_norm in present else None,
        head=_HEAD,
        tied_head=tied,
        conv1d=layout.conv1d,
    )
    return Outline(family, files.layers, shapes, _positions(files, name))


def _in_memory(name: str) -> str:
    return name.replace(_HEAD_ON_DISK, _HEAD, 1) if name.startswith(f"{_HEAD_ON_DISK}.") else name


def _positions(files: ModelFiles, family: str) -> int:
    found = [files.config[key] for key in _POSITION_KEYS if isinstance(files.config.get(key), int)]
    default = _GPT2_POSITIONS if family == "gpt2" else sys.maxsize
    return min(found, default=default)


def _built(files: ModelFiles, trust_remote_code: bool) -> Outline:
    """By the modules of the model itself, on the meta device."""
    from quant_fairness_plugin.model.load import empty_model

    model = empty_model(files, trust_remote_code=trust_remote_code)
    model.tie_weights()
    family = detect_family(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Outline(family, files.layers, shapes, limit if isinstance(limit, int) else sys.maxsize)
