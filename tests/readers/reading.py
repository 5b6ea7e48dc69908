"""What a reader said of a checkpoint beside what our own dequantizer says of it, as a few numbers."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from quant_fairness_plugin.checkpoint.module_map import module_map
from quant_fairness_plugin.checkpoint.readers.compare import compare_reading
from quant_fairness_plugin.checkpoint.readers.running import Reading
from quant_fairness_plugin.model.families import detect_family
from tests.readers.matrix import MISTAKABLE

IN_16_BIT = frozenset({"Linear", "Conv1D", "UnquantizedLinearMethod"})
"""What readers call a module that is not quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Distances are in units of what computing in float16 changes in our own dequantized model."""

    distance: float
    """From the reader to our dequantizer."""
    mistaken_distance: float
    """From the reader to one that took layers 10 and 11 for layer 1."""
    behind: float
    """Of the tokens that a server chose: how much less likely than our likeliest one the worst is."""
    equal: float | None
    """Share of the tokens that a server chose that are our likeliest ones."""
    quantized: frozenset[str]
    """Modules that the reader computes from integers."""
    all_modules: frozenset[str]
    """Linear modules of the blocks that the reader has."""
    planned: frozenset[str]
    """Modules that the checkpoint's record names quantized, by the reader's names."""
    all_planned: frozenset[str]
    """Linear modules of the blocks of the 16-bit model, by the reader's names."""


@dataclass(frozen=True, slots=True)
class Models:
    """What a reader is held against."""

    original: PreTrainedModel
    dequantized: PreTrainedModel

    def judge(self, reading: Reading, folder: Path) -> Judged:
        """The numbers of one reading of a checkpoint folder."""
        blocks = detect_family(self.original).blocks
        named = {_in_block(name, blocks): method for name, method in reading.methods.items()}
        inside = {name: method for name, method in named.items() if name is not None}
        found = compare_reading(reading, self.dequantized)
        planned, all_planned = self._modules(folder, merged=reading.reader == "vllm")
        return Judged(
            distance=found.distance,
            mistaken_distance=compare_reading(reading, self._mistaken()).distance,
            behind=found.behind,
            equal=self._equal(reading) if reading.reader == "vllm" else None,
            quantized=frozenset(name for name, method in inside.items() if method not in IN_16_BIT),
            all_modules=frozenset(inside),
            planned=planned,
            all_planned=all_planned,
        )

    def _modules(self, folder: Path, *, merged: bool) -> tuple[frozenset[str], frozenset[str]]:
        """Quantized modules by the record of a checkpoint, and all linear modules of the blocks.

        `merged`: under the names that servers give to fusion groups.
        """
        record = json.loads((folder / "quant_fairness.json").read_text(encoding="utf-8"))
        done = frozenset(record["quantized_modules"])
        found = module_map(self.original, detect_family(self.original), done)
        everything = frozenset((*found.quantized, *found.kept_in_blocks))
        if not merged:
            return done, everything
        parts = {part for group in found.fused.values() for part in group}
        whole = frozenset(name for name, group in found.fused.items() if done.issuperset(group))
        return whole | (done - parts), frozenset(found.fused) | (everything - parts)

    def _mistaken(self) -> PreTrainedModel:
        mistaken = deepcopy(self.dequantized)
        state = self.original.state_dict()
        blocks = detect_family(self.original).blocks
        chosen = {name: state[name] for name in state if name.startswith(tuple(f"{blocks}.{i}." for i in MISTAKABLE))}
        assert chosen
        mistaken.load_state_dict(chosen, strict=False)
        return mistaken

    @torch.no_grad()
    def _equal(self, reading: Reading) -> float:
        hits: list[bool] = []
        for sequence in reading.sequences:
            ids, new = sequence["ids"], sequence["new"]
            own = self.dequantized(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist()
            hits += [a == b for a, b in zip(own[-new - 1 : -1], ids[-new:], strict=True)]
        return sum(hits) / len(hits)


def _in_block(name: str, blocks: str) -> str | None:
    """A module's name as the model has it; None outside of the blocks.

    vLLM runs families that it has no code for through Transformers, and calls their list of blocks `model.layers`.
    """
    found = re.search(r"\.(\d+\..+)$", name)
    return f"{blocks}.{found[1]}" if found else None
