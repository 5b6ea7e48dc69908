"""A model larger than memory: its decoder blocks are read from safetensors files while they are needed.

`open_streamed` returns what `load_model` would, with the same values in every parameter that is there. What is there:
norms, positions and biases outside the blocks, always; a block, inside `StreamedModel.resident`. The token embedding
and the head stay in the files: lookups read their rows, and the head is read by slices of the vocabulary (`Table`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.model.activations import dtype_for, probe_rows
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
from quant_fairness_plugin.model.reading import Place, read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles, resolved
from quant_fairness_plugin.model.skeleton import match_tensors, place_buffers, put
from quant_fairness_plugin.model.stacked_files import single_tensors
from quant_fairness_plugin.model.storage import rounded, storage_dtype
from quant_fairness_plugin.model.tables import Table, look_up_in_files, tables_of


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
        look_up_in_files(model, self.tables)
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
    parts = find_parts(model, files, single_tensors(files), storage=stored, compute=compute, device=device)
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
    return Parts(family, places, tables_of(model, files, places, storage, compute, device))


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
