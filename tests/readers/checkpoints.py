"""Exports for the readers to load, and what a reader said of one beside what our own dequantizer says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import CheckpointFormat
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.serve.load import load_quantized
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
LAYERS = 12
PROTECTED = 1
"""A reader that matches names by prefix or as a substring takes layers 10 and 11 for layer 1."""
MISTAKABLE = (10, 11)
PROMPT_LENGTHS = (1, 2, 17, 63)
TOLERANCE = 2.0
"""In units of what computing in float16, as the readers do, changes in our own dequantized model (`Reading.unit`).

Measured on the random and the trained model: vLLM 0.7 and 0.9, gptqmodel 0.9 (random); readers that mixed up layers
would be at 4.7 and 6.
"""


@dataclass(frozen=True)
class Reading:
    """What a reader said of a checkpoint, and the models to hold against it."""

    methods: dict[str, str]
    """Linear module, by the reader's name → class of what computes it."""
    sequences: list[dict[str, Any]]
    """`ids` of each sequence, the `predictions` after each token (token → log-probability), and how many were `new`."""
    original: PreTrainedModel
    dequantized: PreTrainedModel

    def differences(self, model: PreTrainedModel) -> Tensor:
        """Log-probabilities by the reader minus those by a model, of the same tokens after the same tokens, in nats."""
        return torch.tensor([difference for sequence in self.sequences for difference in _compare(model, sequence)])

    @cached_property
    def unit(self) -> float:
        """Root mean square of what float16 does to our dequantized model's log-probabilities, in nats."""
        in_float16 = deepcopy(self.dequantized).to(torch.float16)  # type: ignore[arg-type] # as in model/load.py
        return rms(self.differences(in_float16) - self.differences(self.dequantized))

    @cached_property
    def own_distance(self) -> float:
        """How far the reader is from our dequantizer, in units."""
        return rms(self.differences(self.dequantized)) / self.unit

    @cached_property
    def mistaken_distance(self) -> float:
        """How far the reader is from one that took layers 10 and 11 for the protected layer, in units."""
        mistaken = deepcopy(self.dequantized)
        state = self.original.state_dict()
        chosen = {
            name: state[name] for name in state if name.startswith(tuple(f"model.layers.{i}." for i in MISTAKABLE))
        }
        assert chosen
        mistaken.load_state_dict(chosen, strict=False)
        return rms(self.differences(mistaken)) / self.unit


def rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Float32 `[tokens, vocabulary]`: row i is the prediction after token i."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def read_checkpoint(model: str, format: CheckpointFormat, reader: str, root: Path) -> Reading:
    """Export a model with layer 1 protected, have a reader read it, and load both again ourselves.

    Args:
        model: `tiny` (random; its heads of 64 are a size that vLLM has on a CPU) or a bundled name.
        format: of the export.
        reader: `vllm` or `gptqmodel`: `<reader>_reader.py` runs in `.venv-<reader>`. Skips where that is not built.
        root: an empty folder.
    """
    python = _reader_python(reader)
    source, out = _model_folder(model, root), root / "checkpoint"
    _export(source, out, format)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    vocabulary = original.config.vocab_size
    prompts = [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in PROMPT_LENGTHS]
    asked, answered = root / "request.json", root / "answer.json"
    asked.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
    script = Path(__file__).with_name(f"{reader}_reader.py")
    done = subprocess.run(
        [python, script, out, asked, answered], capture_output=True, text=True, check=False, cwd=root, timeout=3600
    )
    assert done.returncode == 0, f"{reader} cannot read it:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    answer = json.loads(answered.read_text(encoding="utf-8"))
    return Reading(answer["methods"], answer["sequences"], original, load_quantized(out, kernel="reference"))


def _compare(model: PreTrainedModel, sequence: dict[str, Any]) -> Iterator[float]:
    own = log_probabilities(model, sequence["ids"])
    for i, predictions in enumerate(sequence["predictions"]):
        for token, value in predictions.items():
            yield value - float(own[i, int(token)])


def _reader_python(reader: str) -> Path:
    environment = ROOT / f".venv-{reader}"
    if not (environment / ".installed").exists():
        pytest.skip(f"{environment.name} is not built; `make test-readers` builds it")
    return environment / "bin" / "python"


def _model_folder(name: str, root: Path) -> Path:
    if name != "tiny":
        return ROOT / "quant_fairness_plugin" / "model" / "bundled" / name
    folder = root / "tiny"
    write_tiny_model(folder, "llama", layers=LAYERS, width=256)
    return folder


def _export(model: Path, out: Path, format: CheckpointFormat) -> None:
    quantizer = FairQuantizer.from_pretrained(
        str(model),
        method="gptq",
        protect_layers=(PROTECTED,),
        languages=("en", "he", "zh"),
        tokens_per_language=512,
        format=format,
    )
    quantizer.save_pretrained(out, measure=None)
