"""What a quantization has solved, layer by layer: in memory, or in a file per layer.

Files keep memory to one layer, and are what an interrupted quantization goes on from: a file is written beside its name
and renamed, so that it is whole or not there. What is read back has the same bits.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid, TemporaryFolder
from quant_fairness_plugin.errors import ArtifactError, ResourceError
from quant_fairness_plugin.model.reading import Place, places_of_file, read_tensor
from quant_fairness_plugin.quantize.columns import KeptColumns
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.solving import Solved

V = TypeVar("V")
_FACTS = "layer"
_TENSORS, _FOLDED, _COLUMNS = "tensors", "folded", "columns"
_PARTS = ("integers", "scales", "zeros", "divisor")
"""Fields of a `QuantizedTensor`."""
_logger = logging.getLogger(__name__)


class Lazy(Mapping[str, V]):
    """A mapping whose values are read when they are asked for, and not kept."""

    def __init__(self, owner: object) -> None:
        """Hold on to an owner, such as a temporary folder, as long as values can be asked for."""
        self._owner = owner
        self._readers: dict[str, Callable[[], V]] = {}

    def add(self, name: str, read: Callable[[], V]) -> None:
        """Take in a name and what reads its value."""
        self._readers[name] = read

    def __getitem__(self, name: str) -> V:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(slots=True)
class Results:
    """All layers that are solved. The mappings are those of `QuantizedModel`."""

    tensors: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    folded: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, KeptColumns] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    """Module that could not be solved → reason."""

    def has(self, layer: int) -> bool:
        """Return whether a layer was solved by an earlier run."""
        return False

    def add(self, layer: int, solved: Solved) -> None:
        """Take in what a layer came to."""
        for ours, its in ((self.tensors, solved.tensors), (self.folded, solved.folded), (self.columns, solved.columns)):
            assert isinstance(ours, dict)
            ours |= its
        self._note(solved.losses, solved.damping, {name: tensor.grid for name, tensor in solved.tensors.items()})
        self.kept |= solved.kept

    def layer(self, layer: int) -> Solved:
        """Return what an earlier run solved in a layer."""
        raise KeyError(layer)

    def _note(self, losses: Mapping[str, float], damping: Mapping[str, float], grids: Mapping[str, Grid]) -> None:
        self.losses |= losses
        self.damping |= damping
        self.grids |= grids


class StoredResults(Results):
    """Layers in the files of a folder, each read when it is asked for."""

    def __init__(self, folder: Path | None) -> None:
        """Find what is in a folder already.

        Args:
            folder: an existing folder; None makes one that is removed with the last reference to the results.
        """
        owner = None
        if folder is None:
            owner = TemporaryFolder()
            folder = owner.path
        self._folder = folder
        super().__init__(Lazy(owner), Lazy(owner), Lazy(owner))
        self._layers: dict[int, tuple[dict[str, Any], dict[str, Place]]] = {}
        for path in sorted(self._folder.glob("layer-*.safetensors")):
            self._take(path)

    def has(self, layer: int) -> bool:
        """Return whether a layer was solved, in this run or an earlier one."""
        return layer in self._layers

    def add(self, layer: int, solved: Solved) -> None:
        """Write what a layer came to.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        path = self._folder / f"layer-{layer:05d}.safetensors"
        beside = path.with_suffix(".partial")
        try:
            save_file(_flattened(solved), beside, metadata={_FACTS: json.dumps(_facts(layer, solved))})
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        except (OSError, SafetensorError) as err:
            raise ResourceError(
                f"{path}: what was solved cannot be written ({err}). Make room, or use another folder."
            ) from err
        self._take(path)

    def layer(self, layer: int) -> Solved:
        """Return what was solved in a layer."""
        facts, _ = self._layers[layer]
        return Solved(
            tensors={name: self.tensors[name] for name in facts["grids"]},
            folded={name: self.folded[name] for name in facts[_FOLDED]},
            columns={name: self.columns[name] for name in facts[_COLUMNS]},
            losses=facts["losses"],
            damping=facts["damping"],
            kept=facts["kept"],
        )

    def _take(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[_FACTS])
            places = dict(places_of_file(path))
            grids = {name: Grid(**grid) for name, grid in facts["grids"].items()}
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, ArtifactError) as err:
            _logger.warning("%s: not a whole layer (%s); it is solved again", path, err)
            return
        self._layers[facts["layer"]] = facts, places
        tensors, folded, columns = self.tensors, self.folded, self.columns
        assert isinstance(tensors, Lazy)
        assert isinstance(folded, Lazy)
        assert isinstance(columns, Lazy)
        for name, grid in grids.items():
            tensors.add(name, partial(_tensor, places, name, grid))
        for name in facts[_FOLDED]:
            folded.add(name, partial(read_tensor, places[f"{_FOLDED}/{name}"]))
        for name in facts[_COLUMNS]:
            columns.add(name, partial(_kept, places, name))
        self._note(facts["losses"], facts["damping"], grids)
        self.kept |= facts["kept"]


def _facts(layer: int, solved: Solved) -> dict[str, Any]:
    return {
        "layer": layer,
        "grids": {name: asdict(tensor.grid) for name, tensor in solved.tensors.items()},
        _FOLDED: list(solved.folded),
        _COLUMNS: list(solved.columns),
        "losses": solved.losses,
        "damping": solved.damping,
        "kept": solved.kept,
    }


def _flattened(solved: Solved) -> dict[str, Tensor]:
    """Return every tensor of a layer under a name of its own."""
    flat = {f"{_FOLDED}/{name}": value for name, value in solved.folded.items()}
    for name, tensor in solved.tensors.items():
        parts = {part: getattr(tensor, part) for part in _PARTS}
        flat |= {f"{_TENSORS}/{name}/{part}": value for part, value in parts.items() if value is not None}
    for name, kept in solved.columns.items():
        flat |= {f"{_COLUMNS}/{name}/index": kept.index, f"{_COLUMNS}/{name}/delta": kept.delta}
    # Copies, because safetensors refuses tensors that share memory (modules of a group share the kept channels).
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in flat.items()}


def _tensor(places: Mapping[str, Place], name: str, grid: Grid) -> QuantizedTensor:
    stored = {part: f"{_TENSORS}/{name}/{part}" for part in _PARTS}
    parts = {part: read_tensor(places[full]) for part, full in stored.items() if full in places}
    return QuantizedTensor(grid=grid, **parts)


def _kept(places: Mapping[str, Place], name: str) -> KeptColumns:
    index, delta = (read_tensor(places[f"{_COLUMNS}/{name}/{part}"]) for part in ("index", "delta"))
    return KeptColumns(index, delta)
