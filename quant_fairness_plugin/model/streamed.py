"""A model larger than memory: its decoder blocks are read from safetensors files while they are needed.

`open_streamed` returns what `load_model` would, with the same values in every parameter that is there. What is there:
norms, positions and biases outside the blocks, always; a block, inside `StreamedModel.resident`. The token embedding
and the head stay in the files: lookups read their rows, and the head is read by slices of the vocabulary (`Table`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.activations import dtype_for, probe_rows
from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.in_blocks import largest_activation_by_blocks
from quant_fairness_plugin.model.load import (
    LoadedModel,
    check_device,
    check_layer_count,
    compute_dtype,
    empty_model,
    load_tokenizer,
    say_untied,
)
from quant_fairness_plugin.model.reading import Place, read_parts, read_rows, read_tensor, same_values
from quant_fairness_plugin.model.resolve import ModelFiles, resolved
from quant_fairness_plugin.model.skeleton import match_tensors, place_buffers, put
from quant_fairness_plugin.model.storage import rounded, storage_dtype

_PART_VALUES = 1 << 22
"""Values of a table that are checked at once."""
_MMAP_THRESHOLD = -3
"""glibc's name (malloc.h) for the size from which an allocation is a mapping of its own."""
_LARGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix with a row per token of the vocabulary, left in its file (on an accelerator: held there in 16 bit)."""

    name: str
    place: Place
    storage: torch.dtype
    compute: torch.dtype
    device: torch.device
    held: Tensor | None

    def rows(self, indices: Tensor) -> Tensor:
        """Return some rows, `[indices, width]`, in the compute dtype."""
        if self.held is not None:
            return self.held[indices].to(self.compute)
        return self._ready(read_rows(self.place, indices.tolist()))

    def part(self, part: slice) -> Tensor:
        """Return consecutive rows, `[rows, width]`, in the compute dtype."""
        if self.held is not None:
            return self.held[part].to(self.compute)
        [values] = read_parts(self.place, [(part.start, part.stop)])
        return self._ready(values)

    def equals(self, other: Table) -> bool:
        """Return whether both hold the same values, compared in their files."""
        if self.held is not None or other.held is not None:
            return False
        return self.compute == other.compute and same_values(self.place, other.place)

    def _ready(self, values: Tensor) -> Tensor:
        return values.to(self.storage).to(device=self.device, dtype=self.compute)


@dataclass(frozen=True, slots=True)
class StreamedModel(LoadedModel):
    """A model whose blocks are on the meta device until they are needed.

    The parameters of the first block at rest, and those of tables, have their shape, type and device but no memory:
    they read as NaN. So the model can be rehearsed (which sends one token through the first block, to see what kind of
    value a block returns), and nothing that is computed with them passes for a number.
    """

    places: Mapping[str, Place]
    """Parameter → where it is in the files."""
    tables: Mapping[str, Table]
    compute: torch.dtype
    memory_budget: int | None = None
    """Bytes for all that is held at once, beside the interpreter and its libraries; None sets no limit."""
    _resident: set[int] = field(default_factory=set)

    def fetch(self, layer: int) -> dict[str, Tensor]:
        """Return the parameters of a block by full name, in 16 bit, on the model's device; the model is not touched.

        May run in another thread than the model, and then uses a separate stream.

        Raises:
            InvalidLayerError: no such layer.
            ArtifactError: a parameter cannot be read, or holds NaN or infinite values.
            UnsupportedModelError: a value is too large for the storage dtype.
        """
        prefix = f"{self.family.blocks}.{layer}."
        names = [
            f"{prefix}{name}" for name, _ in self.block(layer).named_parameters() if f"{prefix}{name}" in self.places
        ]
        device = self.model.device
        stream = _stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):  # without a stream, this does nothing
            values = {name: self._read(name).to(device) for name in names}
        if stream is not None:
            stream.synchronize()
        return values

    def stored(self, name: str) -> Tensor:
        """Return a parameter or buffer as an export stores it, read from its file where it has one."""
        if name not in self.places:
            return LoadedModel.stored(self, name)
        value = self._read(name)
        return value.to(self.storage_dtype) if value.is_floating_point() else value

    @contextmanager
    def resident(self, layer: int, fetched: dict[str, Tensor] | None = None) -> Iterator[None]:
        """Hold the parameters of a block in memory while the context is open.

        Args:
            layer: which one.
            fetched: what `fetch` returned for it, which is emptied; None reads it now.

        Raises:
            QuantFairnessError: as `fetch`.
        """
        if layer in self._resident:
            yield
            return
        values = self.fetch(layer) if fetched is None else fetched
        names = list(values)
        try:
            self._resident.add(layer)
            for name in names:
                value = values.pop(name)
                if value.is_cuda:  # it was made on another stream, which may else reuse its memory too early
                    value.record_stream(torch.cuda.current_stream(value.device))
                put(self.model, name, value.to(self.compute))
            yield
        finally:
            self._resident.discard(layer)
            _rest(self.model, names, self.compute, hollow=self.model.device if layer == 0 else None)

    @contextmanager
    def widened(self, names: Iterable[str]) -> Iterator[None]:
        """Hold those of these parameters that are tables whole in the model, in the compute dtype."""
        tables = [table for name in names if (table := self.tables.get(name)) is not None]
        parameters = {table.name: self.model.get_parameter(table.name) for table in tables}
        originals = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for table in tables:
                parameters[table.name].data = table.part(slice(0, table.place.shape[0]))
            yield
        finally:
            for name, original in originals.items():
                parameters[name].data = original

    def settle(self, device: torch.device) -> None:
        """Read everything outside the blocks but tables, and let the rest rest; called once, after it was made."""
        model, prefix = self.model, f"{self.family.blocks}."
        own = [name for name, _ in model.named_parameters() if self.family.owns(name)]
        others = [name for name, _ in model.named_parameters() if not self.family.owns(name)]
        for name in own:
            if name not in self.tables and not name.startswith(prefix):
                put(model, name, self._read(name).to(device=device, dtype=self.compute))
        blocks = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        _rest(model, others, self.compute, hollow=device)  # parts that are not text are never run
        _rest(model, blocks, self.compute)
        _rest(model, [name for name in blocks if name.startswith(f"{prefix}0.")], self.compute, hollow=device)
        _rest(model, self.tables, self.compute, hollow=device)
        _look_up_in_files(self)
        model.train(False)

    def _read(self, name: str) -> Tensor:
        return rounded(read_tensor(self.places[name]), name, self.files, storage=self.storage_dtype)


def open_streamed(
    name: str | ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    sentences: Sequence[str] | None = None,
    storage: torch.dtype | None = None,
) -> StreamedModel:
    """Open a model to be run block by block. Arguments and errors are those of `load_model`.

    The range of a float16 model's activations is looked at only where sentences are given: it reads every block once.

    Weights of a block are checked when it is read, all others now. Pickled weights are refused even with
    `allow_pickle`: they cannot be read one by one.

    Raises:
        ConfigError: no such model, a dtype that is not computed in, or a device that this machine does not have.
        UnsupportedModelError: an architecture that is not supported or that computes what its config alone does not
            determine, or values too large for float16.
        ArtifactError: missing, malformed, surplus or non-finite tensors, or pickled ones.
        ExternalServiceError: the Hub failed.
    """
    compute = compute_dtype(dtype)
    check_device(device)
    files = resolved(name, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    stored = storage_dtype(files) if storage is None else storage
    # Buffers are made in float32, as in a model that is loaded; parameters are replaced below.
    model = empty_model(files, trust_remote_code=trust_remote_code, dtype=torch.float32)
    parts = find_parts(model, files, find_tensors(files), storage=stored, compute=compute, device=device)
    check_layer_count(files, model, parts.family)
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    streamed = StreamedModel(files, model, tokenizer, parts.family, stored, parts.places, parts.tables, compute)
    streamed.settle(torch.device(device))
    if storage is None and sentences is not None and stored == torch.float16:
        rows = probe_rows(model, tokenizer, parts.family, sentences)
        if dtype_for(largest_in_blocks(streamed, rows), files) != stored:
            return open_streamed(
                files, dtype=dtype, trust_remote_code=trust_remote_code, device=device, storage=torch.bfloat16
            )
    say_untied(files, model, parts.family)
    return streamed


def largest_in_blocks(streamed: StreamedModel, rows: Sequence[Sequence[int]]) -> float:
    """Return the largest activation of a model, as `largest_activation` does, one block at a time."""
    table = streamed.tables.get(f"{streamed.family.head}.weight")
    weight = streamed.model.get_submodule(streamed.family.head).get_parameter("weight")

    def head_rows(part: slice) -> Tensor:
        return weight[part] if table is None else table.part(part)

    return largest_activation_by_blocks(streamed, rows, resident=streamed.resident, head_rows=head_rows)


class Parts(NamedTuple):
    """Where the parts of a model are."""

    family: Family
    places: dict[str, Place]
    tables: dict[str, Table]


def find_parts(
    model: PreTrainedModel,
    files: ModelFiles,
    stored: Mapping[str, Place],
    *,
    storage: torch.dtype,
    compute: torch.dtype,
    device: str = "cpu",
) -> Parts:
    """Match the tensors of files with an empty model's parameters, and give the model its buffers.

    Args:
        model: on the meta device.
        files: for errors.
        stored: what the files hold.
        storage: what the values of tables are rounded to.
        compute: what is computed in.
        device: where.

    Raises:
        ArtifactError, UnsupportedModelError: as `open_streamed`.
    """
    places = match_tensors(model, detect_family(model), files, stored)
    family = detect_family(model)  # a head of its own is known by now
    place_buffers(model, family, files, places, device)
    return Parts(family, places, _tables(model, files, places, storage, compute, device))


@contextmanager
def block_feed(
    loaded: LoadedModel, layers: Sequence[int], *, prefetch: bool
) -> Iterator[Callable[[int], AbstractContextManager[None]]]:
    """Yield what makes one of these layers after the other resident; another thread reads the next one meanwhile.

    Args:
        loaded: the model.
        layers: in the order in which they will be run.
        prefetch: whether to read ahead.
    """
    if not isinstance(loaded, StreamedModel):
        yield lambda layer: nullcontext()
        return
    _return_freed_memory()
    model, following = loaded, dict(zip(layers, layers[1:], strict=False))
    coming: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def resident(layer: int) -> Iterator[None]:
        fetched = coming.pop(layer).result() if layer in coming else None
        with model.resident(layer, fetched):
            if prefetch and layer in following:
                coming[following[layer]] = reader.submit(model.fetch, following[layer])
            yield

    with ThreadPoolExecutor(max_workers=1) as reader:
        yield resident


def block_in_memory(loaded: LoadedModel, layer: int) -> AbstractContextManager[None]:
    """Return a context in which a block has its parameters."""
    return loaded.resident(layer) if isinstance(loaded, StreamedModel) else nullcontext()


def budget_of(loaded: LoadedModel) -> int | None:
    """Return the memory budget of a model whose blocks stay in their files, in bytes; None where there is none."""
    return loaded.memory_budget if isinstance(loaded, StreamedModel) else None


def _rest(
    model: PreTrainedModel, names: Iterable[str], compute: torch.dtype, *, hollow: torch.device | None = None
) -> None:
    """Take the memory from parameters: onto the meta device, or to NaN of the same shape on the device `hollow`."""
    for name in names:
        shape = model.get_parameter(name).shape
        nothing = torch.full((), torch.nan, dtype=compute, device=hollow or "meta")
        put(model, name, nothing.expand(shape))


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _tables(
    model: PreTrainedModel,
    files: ModelFiles,
    places: Mapping[str, Place],
    storage: torch.dtype,
    compute: torch.dtype,
    device: str,
) -> dict[str, Table]:
    """Return the token embedding and the head, by all their names, with their values checked."""
    tables: dict[int, Table] = {}
    owners = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    shared = {id(owner.weight) for owner in owners}
    names: dict[str, Table] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            continue
        if id(parameter) not in tables:
            held = _check_table(places[name], name, files, storage, keep=device != "cpu")
            held = None if held is None else held.to(device)
            tables[id(parameter)] = Table(name, places[name], storage, compute, torch.device(device), held)
        names[name] = tables[id(parameter)]
    return names


def _check_table(place: Place, name: str, files: ModelFiles, storage: torch.dtype, *, keep: bool) -> Tensor | None:
    rows, size = place.shape[0], max(1, _PART_VALUES // max(1, place.shape[1]))
    parts = read_parts(place, ((start, min(start + size, rows)) for start in range(0, rows, size)))
    checked_parts: list[Tensor] = []
    for values in parts:
        checked = rounded(values, name, files, storage=storage)
        checked_parts += [checked] if keep else []
    return torch.cat(checked_parts) if keep else None


def _look_up_in_files(streamed: StreamedModel) -> None:
    """Make the embedding read the rows that a call needs, unless its weights are in memory."""
    embedding = streamed.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    [name] = [f"{path}.weight" for path, module in streamed.model.named_modules() if module is embedding]
    table, plain = streamed.tables[name], embedding.forward

    def look_up(ids: Tensor, *positional: Any, **named: Any) -> Any:
        if not _is_hollow(embedding.weight):
            return plain(ids, *positional, **named)
        used, places = torch.unique(ids, return_inverse=True)
        hollow, padding = embedding.weight.data, embedding.padding_idx
        try:
            # The padding token matters to gradients alone, and must not be beyond the rows that are there.
            embedding.weight.data, embedding.padding_idx = table.rows(used), None
            return plain(places, *positional, **named)
        finally:
            embedding.weight.data, embedding.padding_idx = hollow, padding

    lookup: Callable[..., Any] = look_up
    embedding.forward = lookup  # type: ignore[method-assign] # calls of the module look it up on the instance first


def _is_hollow(value: Tensor) -> bool:
    return value.stride() == (0, 0)


def _return_freed_memory() -> None:
    """Have the C library return large tensors to the system as soon as they are freed, from now on in this process.

    By default glibc learns to keep allocations of up to 32 MiB for itself, and weights of one block then lie scattered
    between those of the next: 0.3 GB more than was in use, and growing, for blocks of 60 million values (measured).
    """
    with suppress(AttributeError, OSError, TypeError):  # a C library without it, or no way to call it
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
