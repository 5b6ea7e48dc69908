"""Hidden states between two layers, of every batch and every prefix: in memory while they fit, else in files.

With a folder to resume from, all of them are also written there. A batch has one file of values per layer and a small
index that names the newest whole one; the index is replaced in one step, so that a killed sweep finds each batch either
before or after a layer. What does not have the checksums of the index counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.errors import ResourceError

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Stack:
    """The states of one batch after one stage: `[rows, tokens, width]` per node."""

    stage: int
    nodes: int
    values: dict[int, Tensor] = field(default_factory=dict)
    """Those in memory: all or none."""
    checksums: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stacks:
    """The stacks of all batches."""

    folder: Path
    names: Sequence[str]
    """Of the files of each batch; where `durable`, they say all that the values depend on."""
    shapes: Sequence[tuple[int, ...]]
    """Of one state of each batch."""
    dtype: torch.dtype
    device: torch.device
    in_memory: frozenset[int]
    """Batches that are held in memory."""
    durable: bool
    """Whether all of them are written, to resume from."""
    _now: dict[int, Stack] = field(default_factory=dict)

    def stage(self, batch: int) -> int | None:
        """Return after which stage a batch is, or None where it has to enter the model (again)."""
        if batch not in self._now and self.durable:
            resumed = self._resumed(batch)
            if resumed is not None:
                self._now[batch] = resumed
        return self._now[batch].stage if batch in self._now else None

    def read(self, batch: int, node: int) -> Tensor:
        """Return the states of a node, `[rows, tokens, width]`."""
        stack = self._now[batch]
        return stack.values[node] if stack.values else self._load(batch, stack.stage, node)

    @contextmanager
    def next_stage(self, batch: int, stage: int, nodes: int) -> Iterator[_Writer]:
        """Write the states of a batch after the next stage; they count when the `with` block ends without an error.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        before, stack = self._now.get(batch), Stack(stage, nodes)
        path = None if batch in self.in_memory and not self.durable else self._path(batch, stage)
        try:
            with _Writer(self, batch, stack, path) as writer:
                yield writer
            if self.durable:
                content = {"stage": stage, "checksums": [stack.checksums[node] for node in range(nodes)]}
                write_atomically(self._index(batch), (json.dumps(content) + "\n").encode())
        except OSError as err:
            raise ResourceError(
                f"{self.folder}: hidden states cannot be written ({err.strerror}); they take "
                f"{nodes * self._node_bytes(batch)} bytes for one batch. Make room, or use another folder."
            ) from err
        self._now[batch] = stack
        if before is not None and before.stage != stage:
            self._path(batch, before.stage).unlink(missing_ok=True)

    def drop(self, batch: int) -> None:
        """Forget a batch; its files are removed."""
        stack = self._now.pop(batch, None)
        self._index(batch).unlink(missing_ok=True)
        if stack is not None:
            self._path(batch, stack.stage).unlink(missing_ok=True)
        if self.durable:  # a killed run can have left the values of a stage before, or of one after that it did not end
            for path in self.folder.glob(f"{self.names[batch]}-*.stack"):
                path.unlink(missing_ok=True)

    def _path(self, batch: int, stage: int) -> Path:
        return self.folder / f"{self.names[batch]}-{stage}.stack"

    def _index(self, batch: int) -> Path:
        return self.folder / f"{self.names[batch]}.index.json"

    def _node_bytes(self, batch: int) -> int:
        return torch.Size(self.shapes[batch]).numel() * self.dtype.itemsize

    def _load(self, batch: int, stage: int, node: int) -> Tensor:
        values = torch.empty(self.shapes[batch], dtype=self.dtype)
        with self._path(batch, stage).open("rb") as file:
            file.seek(node * self._node_bytes(batch))
            count = file.readinto(_bytes(values))
        if count != self._node_bytes(batch):
            raise ResourceError(f"{self._path(batch, stage)}: shorter than it was written. Leave the folder alone.")
        return values.to(self.device)

    def _resumed(self, batch: int) -> Stack | None:
        """Return the newest whole stack of a batch in the folder, checked."""
        path = self._index(batch)
        try:
            index: Any = json.loads(path.read_bytes())
            checksums, stage = list(index["checksums"]), int(index["stage"])
            stack = Stack(stage, len(checksums), checksums=dict(enumerate(checksums)))
            for node, checksum in stack.checksums.items():
                values = self._load(batch, stage, node)
                if _checksum(values) != checksum:
                    raise ValueError(f"node {node} has another checksum")
                if batch in self.in_memory:
                    stack.values[node] = values
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, ResourceError) as err:
            _logger.warning("%s: no whole states of a batch (%s); it is run again from the beginning", path, err)
            return None
        return stack


class _Writer:
    """Takes the nodes of a stack in any order."""

    def __init__(self, stacks: Stacks, batch: int, stack: Stack, path: Path | None) -> None:
        self._stacks, self._batch, self._stack, self._path = stacks, batch, stack, path

    def __enter__(self) -> _Writer:
        self._file = None if self._path is None else self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def put(self, node: int, values: Tensor) -> None:
        """Take in the states of a node."""
        stacks = self._stacks
        if self._batch in stacks.in_memory:
            self._stack.values[node] = values
        if self._file is None:
            return
        content = _bytes(values)
        self._file.seek(node * len(content))
        self._file.write(content)
        if stacks.durable:
            self._stack.checksums[node] = _checksum(values)


def batches_in_memory(sizes: Sequence[int], allowance: int) -> frozenset[int]:
    """Return which batches are held in memory.

    Args:
        sizes: the most bytes that each batch has after any stage.
        allowance: bytes. While a batch is run, it has its states before and after the layer.
    """
    left, held = allowance - max(sizes, default=0), set()
    for batch, size in enumerate(sizes):
        if size <= left:
            held.add(batch)
            left -= size
    return frozenset(held)


def _bytes(values: Tensor) -> memoryview:
    plain = values.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type] # numpy's stubs do not say that it is a buffer


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(_bytes(values)).hexdigest()
