"""Slopes of log-probabilities along changes of the weights, with one block in memory at a time.

Forward through all blocks, with what each is given kept in files; from the labels through the head; then backward
through the blocks, each of which is run once more with its graph. No gradient of a weight is ever held: along a change
ΔW of a linear module the slope is Σ δ · (ΔW x) over its tokens, with its inputs x and the gradient δ at its outputs, so
that one backward pass through the activations serves all changes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Precision, temporary_folder
from quant_fairness_plugin.errors import ResourceError, UnsupportedModelError
from quant_fairness_plugin.measure.rows import Batch, Row, TokenRows, pad_rows
from quant_fairness_plugin.measure.scoring import find_head
from quant_fairness_plugin.measure.streamed import Head
from quant_fairness_plugin.model.architectures.experts import EXPERTS
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.devices import wide_dtype
from quant_fairness_plugin.model.experts import Experts
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.rehearsal import BlockCall, check_independent, head_input, rehearse
from quant_fairness_plugin.sweep.sampling import BACKWARD_STEPS

BATCH_TOKENS = 256
"""Tokens of a batch, padding included: a block's graph is held for one batch, at about ten values a weight's output."""
HEAD_VALUES = 1 << 23
"""Most log-probabilities that are held at once, but for a row that has more."""
HEAD_ROWS = 4096
"""Tokens of the vocabulary whose rows of the head are read at once."""

Key = tuple[str, Precision]
"""A unit and what it is changed to."""
Slopes = Mapping[Key, float]
"""In nats."""
Errors = Mapping[str, Mapping[Key, Tensor]]
"""Weight of a linear module → changes of it."""
Labels = Callable[[Tensor, Batch], Iterable[Tensor]]
"""Log-probabilities `[targets, vocabulary]` and the row → labels `[targets]`, any number of times, the same for all."""
Progress = Callable[[int, int], None]
"""Called with (steps done, in all)."""


class ChangesByLayer(Protocol):
    """Where the changes of a layer's weights come from."""

    def of_layer(self, layer: int) -> Errors:
        """Return them. The layer's block is in memory."""


def slopes_of(
    loaded: LoadedModel,
    tokenized: TokenRows,
    changes: ChangesByLayer,
    labels: Labels,
    *,
    progress: Progress | None = None,
) -> list[tuple[Row, list[Slopes]]]:
    """Return every row with the slopes of its summed log-probability along the changes, once for each of its labels.

    Args:
        loaded: the model, in evaluation mode; bit-identical afterwards.
        tokenized: the rows.
        changes: the directions.
        labels: whose log-probability; asked in the order of the rows.
        progress: called with (steps done, in all).

    Raises:
        UnsupportedModelError: layers that take more from earlier ones than a hidden state, or changes of something else
            than linear modules.
        ArtifactError: a block cannot be read.
        ResourceError: hidden states cannot be written.
    """
    with temporary_folder() as folder:
        passes = _Passes(loaded, folder, progress)
        batches = [passes.entered(batch) for batch in tokenized.batches(BATCH_TOKENS)]
        passes.forward(batches)
        _turn(loaded, batches, tokenized.rows, labels)
        passes.backward(batches, changes)
    slopes = {row: each.slopes_of(number) for each in batches for number, row in enumerate(each.batch.rows)}
    return [(row, slopes[row]) for row in tokenized.rows]


@dataclass(slots=True)
class _Batch:
    """Rows on their way through the blocks and back."""

    batch: Batch
    calls: tuple[BlockCall, ...]
    state: Tensor
    """What the next block is given, `[rows, tokens, width]`."""
    gradients: list[Tensor] = field(default_factory=list)
    """For each choice of labels: at the output of the block that is next on the way back."""
    slopes: list[dict[Key, list[float]]] = field(default_factory=list)
    """For each choice of labels: the slope of every row."""

    def slopes_of(self, row: int) -> list[Slopes]:
        """Return a row's slopes, once for each choice of labels."""
        return [{key: values[row] for key, values in slopes.items()} for slopes in self.slopes]


@dataclass(slots=True)
class _Passes:
    """Both ways through the blocks."""

    loaded: LoadedModel
    folder: Path
    """For what every block is given."""
    progress: Progress | None
    steps: int = 0

    def entered(self, batch: Batch) -> _Batch:
        """Bring a batch to the first block."""
        start = rehearse(self.loaded, batch.ids, batch.mask)
        return _Batch(batch, start.calls, start.hidden)

    @torch.no_grad()
    def forward(self, batches: Sequence[_Batch]) -> None:
        """Bring all batches behind the last block, and keep what every block was given."""
        layers = range(self.loaded.layers)
        with block_feed(self.loaded, layers, prefetch=True) as resident:
            for layer in layers:
                self._keep(layer, batches)
                with resident(layer):
                    for each in batches:
                        each.state = each.calls[layer].run(self.loaded.block(layer), each.state)
                        check_independent(each.calls[layer])
                self._count(1)

    def backward(self, batches: Sequence[_Batch], changes: ChangesByLayer) -> None:
        """Bring the gradients back before the first block, and add up the slopes on the way."""
        layers = range(self.loaded.layers - 1, -1, -1)
        with block_feed(self.loaded, layers, prefetch=True) as resident:
            for layer in layers:
                kept = load_file(self._path(layer))
                with resident(layer), _Watch.over(self.loaded, changes.of_layer(layer)) as watch:
                    for number, each in enumerate(batches):
                        state = kept[str(number)].to(each.state.device).requires_grad_(True)
                        watch.start(each)
                        with torch.enable_grad():
                            output = each.calls[layer].run(self.loaded.block(layer), state)
                        _go_back(each, output, state, watch)
                self._path(layer).unlink()
                self._count(BACKWARD_STEPS)

    def _keep(self, layer: int, batches: Sequence[_Batch]) -> None:
        states = {str(number): each.state.cpu().contiguous() for number, each in enumerate(batches)}
        try:
            save_file(states, self._path(layer))
        except OSError as err:
            raise ResourceError(
                f"{self.folder}: hidden states cannot be written ({err}). Make room, or set TMPDIR to another folder."
            ) from err

    def _path(self, layer: int) -> Path:
        return self.folder / f"before-{layer}.safetensors"

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.progress is not None:
            self.progress(self.steps, (1 + BACKWARD_STEPS) * self.loaded.layers)


def _go_back(each: _Batch, output: Tensor, state: Tensor, watch: _Watch) -> None:
    """Take a batch's gradients from the output of a block to its input, for every choice of labels."""
    for number, gradient in enumerate(each.gradients):
        watch.slopes = each.slopes[number]
        more = number + 1 < len(each.gradients)
        [each.gradients[number]] = torch.autograd.grad(output, state, gradient, retain_graph=more)


class _Given(NamedTuple):
    """A batch at the head."""

    last: Tensor
    """The output of the last block."""
    inputs: Tensor
    """What the head is given where a token is predicted, `[targets, width]`, with its graph."""
    gradients: list[Tensor]
    """At `inputs`, for every choice of labels."""


def _turn(loaded: LoadedModel, batches: Sequence[_Batch], rows: Sequence[Row], labels: Labels) -> None:
    """Set every batch's gradients at the output of the last block."""
    head, given = find_head(loaded), [_at_the_head(loaded, each) for each in batches]
    places = {
        row: (at, (each.batch.owners == number).nonzero()[:, 0])
        for each, at in zip(batches, given, strict=True)
        for number, row in enumerate(each.batch.rows)
    }
    for some in _groups(rows, len(head.weight)):
        inputs = torch.cat([at.inputs.detach()[where] for at, where in map(places.__getitem__, some)])
        for number, gradient in enumerate(_label_gradients(head, inputs, some, labels)):
            parts = torch.split(gradient, [len(places[row][1]) for row in some])
            for row, part in zip(some, parts, strict=True):
                at, where = places[row]
                if number == len(at.gradients):
                    at.gradients.append(torch.zeros_like(at.inputs))
                at.gradients[number][where] = part
    for each, at in zip(batches, given, strict=True):
        each.gradients = [torch.autograd.grad(at.inputs, at.last, one, retain_graph=True)[0] for one in at.gradients]
        each.slopes = [{} for _ in at.gradients]


def _at_the_head(loaded: LoadedModel, each: _Batch) -> _Given:
    with torch.enable_grad():
        last = each.state.detach().requires_grad_(True)
        inputs = head_input(loaded, each.batch.ids, each.batch.mask, last).flatten(0, 1)
        return _Given(last, inputs[each.batch.positions.to(inputs.device)], [])


def _groups(rows: Sequence[Row], vocabulary: int) -> Iterator[list[Row]]:
    """Consecutive rows whose log-probabilities are held at once."""
    some: list[Row] = []
    for row in rows:
        if some and sum(len(each.ids) for each in [*some, row]) * vocabulary > HEAD_VALUES:
            yield some
            some = []
        some.append(row)
    yield some


def _label_gradients(head: Head, inputs: Tensor, rows: Sequence[Row], labels: Labels) -> list[Tensor]:
    """Return the gradient of log p(label) at what the head is given, `[targets, width]`, for each choice of labels."""
    vocabulary = len(head.weight)
    parts = [slice(start, min(start + HEAD_ROWS, vocabulary)) for start in range(0, vocabulary, HEAD_ROWS)]
    with torch.no_grad():
        log_probabilities = torch.cat([head.logits(inputs, part) for part in parts], dim=1).log_softmax(dim=1)
    chosen = _chosen(log_probabilities, rows, labels)
    probabilities = log_probabilities.exp_()
    gradients = [torch.zeros_like(inputs) for _ in chosen]
    for part in parts:
        with torch.enable_grad():
            start = inputs.detach().requires_grad_(True)
            logits = head.logits(start, part)
        for gradient, label in zip(gradients, chosen, strict=True):
            inside = ((label >= part.start) & (label < part.stop)).nonzero()[:, 0]
            slope = -probabilities[:, part]
            slope[inside, label[inside] - part.start] += 1
            gradient += torch.autograd.grad(logits, start, slope, retain_graph=True)[0]
    return gradients


def _chosen(log_probabilities: Tensor, rows: Sequence[Row], labels: Labels) -> list[Tensor]:
    """Return the labels of consecutive rows, `[targets]` for each choice."""
    by_row = torch.split(log_probabilities, [len(row.ids) - row.first for row in rows])
    chosen = [list(labels(some, pad_rows([row]))) for row, some in zip(rows, by_row, strict=True)]
    return [torch.cat(each).to(log_probabilities.device) for each in zip(*chosen, strict=True)]


@dataclass(slots=True)
class _Watch:
    """Hooks on the linear modules of a block that note the slopes of the batch that is running."""

    keys: frozenset[Key]
    slopes: dict[Key, list[float]] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0
    chosen: dict[str, Tensor] = field(default_factory=dict)
    """Experts of the block by full name → the numbers of those that each token goes to, `[rows · tokens, k]`."""

    @classmethod
    @contextmanager
    def over(cls, loaded: LoadedModel, errors: Errors) -> Iterator[_Watch]:
        """Watch the modules of these weights inside a `with` block."""
        watch = cls(frozenset(key for changes in errors.values() for key in changes))
        with ExitStack() as stack:
            for name in {experts for experts, _ in map(_expert_of, errors) if experts}:
                experts = loaded.model.get_submodule(name)
                stack.callback(experts.register_forward_pre_hook(watch._note_routing(name)).remove)
            for name, changes in errors.items():
                hook = watch._hook(name, is_transposed(loaded, name), changes)
                module = loaded.model.get_submodule(name.removesuffix(".weight"))
                stack.callback(module.register_forward_hook(hook).remove)
            yield watch

    def start(self, each: _Batch) -> None:
        """Expect a batch."""
        self.rows, self.tokens = each.batch.ids.shape
        for slopes in each.slopes:
            slopes |= {key: [0.0] * self.rows for key in self.keys}

    def _hook(
        self, name: str, transposed: bool, changes: Mapping[Key, Tensor]
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            owners = self._owners(name, output)
            with torch.no_grad():
                moved = {
                    key: given[0] @ change if transposed else nn.functional.linear(given[0], change)
                    for key, change in changes.items()
                }

            def add(gradient: Tensor) -> None:
                for key, change in moved.items():
                    products = (gradient * change).flatten(0, -2).sum(dim=1, dtype=wide_dtype(gradient.device))
                    sums = products.new_zeros(self.rows).index_add_(0, owners, products).tolist()
                    self.slopes[key] = [a + b for a, b in zip(self.slopes[key], sums, strict=True)]

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    def _note_routing(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(experts: nn.Module, given: tuple[Tensor, ...]) -> None:
            assert isinstance(experts, Experts)
            self.chosen[name] = experts.routing(given).chosen

        return note

    def _owners(self, name: str, output: Tensor) -> Tensor:
        """Return the row of every token that a module was given, `[tokens]`.

        Raises:
            UnsupportedModelError: it does not see all tokens, row after row, and is no expert.
        """
        experts, number = _expert_of(name)
        if experts in self.chosen:
            return (self.chosen[experts] == number).nonzero()[:, 0] // self.tokens
        given, lead = self.rows * self.tokens, output.shape[:-1]
        if lead.numel() != given or lead[0] not in (self.rows, given):
            raise UnsupportedModelError(
                f"{name} returned {list(output.shape)} for {self.rows} rows of {self.tokens} tokens, so that its "
                "rounding error cannot be told apart by sentence; [rows, tokens, …] is accepted. Use --exhaustive."
            )
        return torch.arange(self.rows, device=output.device).repeat_interleave(self.tokens)


def _expert_of(parameter: str) -> tuple[str, int]:
    """Return the experts that a weight belongs to, by full name, and its number there; "" where it is no expert's."""
    path, _, number = parameter.removesuffix(".weight").rpartition(".")[0].rpartition(".")
    return (path, int(number)) if path.endswith(f".{EXPERTS}") and number.isdecimal() else ("", 0)


def is_transposed(loaded: LoadedModel, parameter: str) -> bool:
    """Return whether the linear module of a weight stores it as `[in_features, out_features]`.

    Raises:
        UnsupportedModelError: it belongs to no linear module.
    """
    module = loaded.model.get_submodule(parameter.rpartition(".")[0])
    if not parameter.endswith(".weight") or not (isinstance(module, nn.Linear) or is_conv1d(module)):
        raise UnsupportedModelError(
            f"{parameter} is no weight of a linear module, so its rounding error cannot be scored by gradients; linear "
            "modules are accepted. Use --exhaustive."
        )
    return is_conv1d(module)
