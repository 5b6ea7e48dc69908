"""A model's map and the shapes of its parameters, without the model: from its config and the headers of its files.

Architectures with a record are recognised by the names and shapes of their tensors, which needs neither torch nor
Transformers; any other is built on the meta device, which takes no memory but some seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.architectures import Architecture, Block, find_architecture, match_architecture
from quant_fairness_plugin.model.architectures.architecture import OBSOLETE_BUFFERS
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.resolve import HEAD_ADVICE, ModelFiles, tensor_shapes

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel  # torch

Sizes = tuple[int, ...]


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
        return self.matrix(self.family.full_names(0)[0])[1]

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        tied = f"{self.family.embeddings[0]}.weight"
        return self.shapes.get(f"{self.family.head}.weight", self.shapes.get(tied, (0,)))[0]

    def matrix(self, module: str) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of a linear module of a block."""
        first, second = self.shapes[f"{module}.weight"]
        return (second, first) if self.family.conv1d else (first, second)

    def table_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the embedding, and of a head of its own."""
        return self.family.table_shapes(self.shapes)


def unit_shapes(model: Outline | LoadedModel, layer: int) -> list[list[tuple[int, int]]]:
    """Return rows and columns of the modules of each unit of a layer."""
    prefix = f"{model.family.blocks}.{layer}"
    units = model.family.units_of(layer)
    return [[model.matrix(f"{prefix}.{module}") for module in unit.modules] for unit in units]


def outline_model(files: ModelFiles, *, trust_remote_code: bool = False) -> Outline:
    """Return the outline of a model, from its config and the headers of its files. No weight is read.

    Raises:
        UnsupportedModelError: an architecture that is not supported.
        ArtifactError: pickled weights, or files that are malformed.
    """
    shapes = {name: shape for name, (_, shape) in tensor_shapes(files).items()}
    # Of any other type, only the model that Transformers builds says what is loaded: names and shapes can be alike.
    known = find_architecture(_model_type(files)) is not None
    record = match_architecture(lambda record: _block_of(shapes, record), _model_type(files)) if known else None
    outline = None if record is None else _known(files, record, shapes)
    return outline or _built(files, trust_remote_code)


def _model_type(files: ModelFiles) -> str:
    return str(files.config.get("model_type", ""))


def _block_of(shapes: Mapping[str, Sizes], record: Architecture) -> Block | None:
    """Return the structure of the blocks; None where they are not in the record's place, or differ."""
    structures = set(_structures(_whole_names(shapes, record), record))
    return structures.pop() if len(structures) == 1 else None


def _whole_names(shapes: Mapping[str, Sizes], record: Architecture) -> Mapping[str, Sizes]:
    """Return the tensors under the names of the whole model.

    Checkpoints of a model without its head (GPT-2 is published so) leave out the first part of every name.
    """
    prefix, _, rest = record.blocks.partition(".")
    if any(name.startswith(f"{record.blocks}.0.") for name in shapes) or not any(
        name.startswith(f"{rest}.0.") for name in shapes
    ):
        return shapes
    heads = (f"{record.head}.", f"{record.stored_name(record.head)}.")
    return {name if name.startswith(heads) else f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _structures(shapes: Mapping[str, Sizes], record: Architecture) -> Iterator[Block]:
    """Yield the structure of every block, read off its tensors."""
    layers: dict[str, dict[str, dict[str, Sizes]]] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{record.blocks}.") and not _is_buffer(name, shape):
            layer, _, rest = name.removeprefix(f"{record.blocks}.").partition(".")
            module, _, kind = rest.rpartition(".")
            layers.setdefault(layer, {}).setdefault(module, {})[kind] = shape
    for modules in layers.values():
        norms = {name for name, tensors in modules.items() if all(len(shape) == 1 for shape in tensors.values())}
        linears = {name: tensors for name, tensors in modules.items() if name not in norms}
        transposed = {name: _is_transposed(tensors) for name, tensors in linears.items()}
        yield Block(
            linears=tuple(sorted(linears)),  # files hold them in any order
            conv1d=frozenset(name for name, known in transposed.items() if known is True),
            plain=frozenset(name for name, known in transposed.items() if known is False),
            norms=frozenset(norms),
            biased=frozenset(name for name, tensors in linears.items() if "bias" in tensors),
        )


def _is_buffer(name: str, shape: Sizes) -> bool:
    """Return whether a tensor is not a parameter: a rotary table, or a mask of GPT-2 (`attn.bias`, four dimensions)."""
    return not 1 <= len(shape) <= 3 or any(re.search(pattern, name) for pattern in OBSOLETE_BUFFERS)


def _is_transposed(tensors: Mapping[str, Sizes]) -> bool | None:
    """Return which way round a linear module stores its weight; None where it is square or has no bias to tell."""
    weight, bias = tensors.get("weight", ()), tensors.get("bias", ())
    if len(weight) != 2 or len(bias) != 1 or weight[0] == weight[1]:
        return None
    return bias[0] == weight[1]


def _known(files: ModelFiles, record: Architecture, stored: Mapping[str, Sizes]) -> Outline | None:
    """Return the outline by the record; None where the files lack an embedding, so that the model itself must say."""
    shapes = {
        record.loaded_name(name): shape
        for name, shape in _whole_names(stored, record).items()
        if name.endswith((".weight", ".bias")) and not _is_buffer(name, shape)
    }
    present = {name.rpartition(".")[0] for name in shapes}
    if not present.issuperset(record.embeddings):
        return None
    tied = _is_tied(files, record, present)
    if tied:
        shapes.pop(f"{record.head}.weight", None)
    architecture = replace(record, final_norm=record.final_norm if record.final_norm in present else None)
    family = Family(record.family_name(_model_type(files)), architecture, tied)
    return Outline(family, files.layers, shapes, record.longest_input(files.config))


def _is_tied(files: ModelFiles, record: Architecture, present: set[str]) -> bool:
    """Return whether the head is the embedding: the config says so, and the file holds no other one.

    Raises:
        ArtifactError: the config says that the head is another one, and the file holds none.
    """
    if record.head not in present:
        if files.config.get("tie_word_embeddings") is False:
            raise ArtifactError(
                f"{files.folder}: holds no {record.stored_name(record.head)}, and config.json says tie_word_embeddings "
                f"false; expected a head, or true. {HEAD_ADVICE}"
            )
        return True
    if not files.config.get("tie_word_embeddings", record.tied_by_default):
        return False
    # Loads torch. Transformers, too, uses the head of the file where it is not the embedding.
    from quant_fairness_plugin.model.coded import find_tensors
    from quant_fairness_plugin.model.reading import same_values

    places = find_tensors(files)
    whole = _whole_names({name: place.shape for name, place in places.items()}, record)
    named = {record.loaded_name(name): place for name, place in zip(whole, places.values(), strict=True)}
    return same_values(named[f"{record.head}.weight"], named[f"{record.embeddings[0]}.weight"])


def _built(files: ModelFiles, trust_remote_code: bool) -> Outline:
    """Return the outline by the modules of the model itself, on the meta device."""
    from quant_fairness_plugin.model.load import empty_model

    model = empty_model(files, trust_remote_code=trust_remote_code)
    model.tie_weights()
    family = detect_family(model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Outline(family, files.layers, shapes, longest_input(model.config.to_dict()))
