"""A model larger than memory: its decoder blocks are read from safetensors files while they are needed.

`open_streamed` returns what `load_model` would, with the same values in every parameter that is there. What is there:
norms, positions and biases outside the blocks, always; a block, inside `StreamedModel.resident`. The token embedding
and the head stay in the files: lookups read their rows, and the head is read by slices of the vocabulary (`Table`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import (
    LoadedModel,
    check_device,
    check_layer_count,
    compute_dtype,
    empty_model,
    load_tokenizer,
)
from quant_fairness_plugin.model.reading import Place, read_parts, read_rows, read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles, resolved
from quant_fairness_plugin.model.skeleton import match_tensors, place_buffers, put
from quant_fairness_plugin.model.storage import rounded, storage_dtype

_PART_VALUES = 1 << 22
"""Values of a table that are checked at once."""


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
) -> StreamedModel:
    """Open a model to be run block by block. Arguments and errors are those of `load_model`.

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
    storage = storage_dtype(files)
    # Buffers are made in float32, as in a model that is loaded; parameters are replaced below.
    model = empty_model(files, trust_remote_code=trust_remote_code, dtype=torch.float32)
    family = detect_family(model)
    places = match_tensors(model, family, files, find_tensors(files))
    family = detect_family(model)  # a head of its own is known by now
    check_layer_count(files, model, family)
    place_buffers(model, family, files, places, device)
    tables = _tables(model, files, places, storage, compute, device)
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    streamed = StreamedModel(files, model, tokenizer, family, storage, places, tables, compute)
    _place_parameters(streamed, torch.device(device))
    model.train(False)
    return streamed


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


def _place_parameters(streamed: StreamedModel, device: torch.device) -> None:
    """Everything outside the blocks but tables is read now; what is left rests."""
    model, prefix = streamed.model, f"{streamed.family.blocks}."
    own = [name for name, _ in model.named_parameters() if streamed.family.owns(name)]
    others = [name for name, _ in model.named_parameters() if not streamed.family.owns(name)]
    for name in own:
        if name not in streamed.tables and not name.startswith(prefix):
            put(model, name, streamed._read(name).to(device=device, dtype=streamed.compute))
    blocks = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    _rest(model, others, streamed.compute, hollow=device)  # parts that are not text are never run
    _rest(model, blocks, streamed.compute)
    _rest(model, [name for name in blocks if name.startswith(f"{prefix}0.")], streamed.compute, hollow=device)
    _rest(model, streamed.tables, streamed.compute, hollow=device)
    _look_up_in_files(streamed)


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
        hollow = embedding.weight.data
        try:
            embedding.weight.data = table.rows(used)
            return plain(places, *positional, **named)
        finally:
            embedding.weight.data = hollow

    lookup: Callable[..., Any] = look_up
    embedding.forward = lookup  # type: ignore[method-assign] # calls of the module look it up on the instance first


def _is_hollow(value: Tensor) -> bool:
    return value.stride() == (0, 0)
