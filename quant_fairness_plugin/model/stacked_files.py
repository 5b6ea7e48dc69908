"""Files that stack the experts of a layer, as Transformers holds them: where the matrices of each expert are in them.

A family that is taken may be published either way (Qwen3.5). What a quantized checkpoint holds is always one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures.experts import find_mixture
from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.headers import TensorShapes
from quant_fairness_plugin.model.reading import Place
from quant_fairness_plugin.model.resolve import ModelFiles, tensor_shapes


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of one expert in a stack `[experts, rows, columns]`."""

    name: str
    """Of the tensor that it would be, were it not stacked."""
    first: int
    """Its first row, counted through all experts."""
    rows: int


def single_shapes(files: ModelFiles) -> TensorShapes:
    """Return name → (dtype, shape) of every tensor, as `tensor_shapes` does, but those of experts one by one."""
    result: TensorShapes = {}
    for name, (dtype, shape) in tensor_shapes(files).items():
        matrices = list(_matrices(files, name, shape))
        for matrix in matrices:
            result[matrix.name] = (dtype, (matrix.rows, shape[-1]))
        if not matrices:
            result[name] = (dtype, shape)
    return result


def single_tensors(files: ModelFiles) -> dict[str, Place]:
    """Return where every tensor is, as `find_tensors` does, but those of experts one by one.

    Raises:
        ArtifactError: as `find_tensors`.
        UnsupportedModelError: a stack in 8 or 4 bits.
    """
    result: dict[str, Place] = {}
    for name, place in find_tensors(files).items():
        matrices = list(_matrices(files, name, place.shape))
        if matrices and place.coding is not None:
            raise UnsupportedModelError(
                f"{files.name}: {name} stacks experts in 8 or 4 bits, which are read one by one or not at all; "
                "use the model in 16 bit"
            )
        result |= {matrix.name: rows_of(place, matrix.first, matrix.rows) for matrix in matrices} or {name: place}
    return result


def rows_of(stack: Place, first: int, count: int) -> Place:
    """Return where some rows of stacked matrices are, counted through all of them, as one matrix."""
    columns = stack.shape[-1]
    return Place(stack.path, stack.offset + first * columns * stack.dtype.itemsize, stack.dtype, (count, columns))


def _matrices(files: ModelFiles, name: str, shape: Sequence[int]) -> Iterator[Matrix]:
    """Yield what a tensor stacks; nothing where it is no stack of a family that is taken."""
    mixture = find_mixture(str(files.config.get("model_type", "")))
    owner, _, part = name.rpartition(".")
    if mixture is None or len(shape) != 3 or not owner.endswith(".experts"):
        return
    names = {"gate_up_proj": mixture.names[:2], "down_proj": mixture.names[2:]}.get(part, ())
    for expert in range(shape[0] if names else 0):
        for place, last in enumerate(names):
            rows = shape[1] // len(names)
            yield Matrix(f"{owner}.{expert}.{last}.weight", expert * shape[1] + place * rows, rows)
