"""What the head of a model is given on every batch, with one block of the model in memory at a time.

All batches go through a block before the next one is read. Between two blocks their hidden states are in memory as far
as they fit, else in files. In a folder to keep them in, what the head is given stays there, named by all that it
depends on, and is not computed again.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import digest, note_circumstances, package_versions, temporary_folder
from quant_fairness_plugin.measure.rows import Batch
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import model_identity
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from quant_fairness_plugin.model.stacks import Stacks, batches_in_memory
from quant_fairness_plugin.model.streamed import budget_of

STATES_IN_MEMORY = 128 << 20
"""Bytes of hidden states that are held in memory; what is more goes to files."""
BUDGET_SHARE = 8
"""One part in so many of a memory budget is for hidden states here: two kinds are held, of up to three models."""
KEPT_VERSION = 1
"""Goes up whenever what the head is given would come out otherwise."""


class HeadInputs:
    """What the head is given where a token is predicted, batch by batch."""

    def __init__(self, loaded: LoadedModel, batches: Sequence[Batch], folder: Path | None) -> None:
        """Look for what is kept; nothing is run yet.

        Args:
            loaded: the model; a `StreamedModel` is read block by block.
            batches: padded rows.
            folder: to keep what the head is given in; None keeps nothing.
        """
        self._loaded, self._batches = loaded, batches
        self._resources = ExitStack()
        self._temporary = self._resources.enter_context(temporary_folder())
        width = linear_weight(loaded.block(0).get_submodule(loaded.family.modules(0)[0])).shape[1]
        names = [f"batch-{number}" for number in range(len(batches))]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            question, circumstances = _identity(loaded)
            note_circumstances(folder, question, circumstances)
            identity = question | circumstances
            names = [_key(identity, batch) for batch in batches]
        shapes = [(len(batch.targets), width) for batch in batches]
        self._given = self._stacks(folder or self._temporary, names, shapes, durable=folder is not None)
        self._width = width

    def close(self) -> None:
        """Remove temporary files."""
        self._resources.close()

    def read(self, number: int) -> Tensor:
        """Return what the head is given on a batch, `[targets, width]`."""
        return self._given.read(number, 0)

    @torch.no_grad()
    def run(self, progress: Callable[[], None]) -> None:
        """Run all batches that are not kept.

        Args:
            progress: called once per batch, as often as layers times batches that are done or kept come to one.
        """
        missing = [number for number in range(len(self._batches)) if self._given.stage(number) is None]
        for _ in range(len(self._batches) - len(missing)):
            progress()
        if not missing:
            return
        loaded, device = self._loaded, self._loaded.model.device
        batches = [self._batches[number] for number in missing]
        names, shapes = [f"hidden-{number}" for number in missing], [(*b.ids.shape, self._width) for b in batches]
        hidden, calls = self._stacks(self._temporary, names, shapes, durable=False), []
        for number, batch in enumerate(batches):
            start = rehearse(loaded, batch.ids.to(device), batch.mask.to(device))
            calls.append(start.calls)
            with hidden.next_stage(number, 0, 1) as following:
                following.put(0, start.hidden)
        layers, reported = range(loaded.layers), 0
        with block_feed(loaded, layers, prefetch=True) as resident:
            for layer in layers:
                with resident(layer):
                    for number in range(len(batches)):
                        output = calls[number][layer].run(loaded.block(layer), hidden.read(number, 0))
                        with hidden.next_stage(number, layer + 1, 1) as following:
                            following.put(0, output)
                for _ in range(len(batches) * (layer + 1) // len(layers) - reported):
                    progress()
                    reported += 1
        for number, batch in enumerate(batches):
            inputs = head_input(loaded, batch.ids, batch.mask, hidden.read(number, 0))
            with self._given.next_stage(missing[number], 0, 1) as following:
                following.put(0, inputs.flatten(0, 1)[batch.positions.to(device)])
            hidden.drop(number)

    def _stacks(
        self, folder: Path, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, durable: bool
    ) -> Stacks:
        dtype, budget = self._loaded.model.dtype, budget_of(self._loaded)
        allowance = STATES_IN_MEMORY if budget is None else min(STATES_IN_MEMORY, budget // BUDGET_SHARE)
        held = batches_in_memory([prod(shape) * dtype.itemsize for shape in shapes], allowance)
        return Stacks(folder, names, shapes, dtype, self._loaded.model.device, held, durable)


def _identity(loaded: LoadedModel) -> tuple[dict[str, object], dict[str, object]]:
    """Return all that hidden states depend on beside the tokens: what they are of, and what decides their last bits."""
    model, versions = loaded.model, package_versions()
    question: dict[str, object] = {
        "version": KEPT_VERSION,
        "model": model_identity(loaded),
        "storage_dtype": str(loaded.storage_dtype),
        "compute_dtype": str(model.dtype),
    }
    return question, {
        "versions": {name: versions[name] for name in ("quant-fairness", "torch", "transformers")},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": str(model.device),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "attention": str(model.config._attn_implementation),
    }


def _key(identity: dict[str, object], batch: Batch) -> str:
    return digest({"model": identity, "rows": [[list(row.ids), row.first] for row in batch.rows]})
