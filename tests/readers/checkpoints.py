"""Exports for the readers to load, and the plans that are refused before one is made."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import ProtectionPlan, Reader
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export import writer
from quant_fairness_plugin.export.shards import write_shards
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from tests.readers.matrix import BUNDLED, LAYERS, PROTECTED, WIDTH, Cell, Checkpoint
from tests.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
PROMPT_LENGTHS = (1, 2, 17, 63)
TOKENS_PER_LANGUAGE = 128
"""Of calibration. Few: what is compared is how the integers are read, not how good they are."""


class _PlanAcceptedError(Exception):
    """The work would have begun: nothing was refused."""


class _PlanOnly(FairQuantizer):
    def quantize(self, plan: ProtectionPlan | None = None) -> QuantizedModel:
        raise _PlanAcceptedError


def source_folder(made: Checkpoint, root: Path) -> Path:
    """The 16-bit model of a checkpoint; a random one is written on first use."""
    if made.model in BUNDLED:
        return ROOT / "quant_fairness_plugin" / "model" / "bundled" / made.model
    folder = root / f"{made.model}-{made.dtype}{'-tied' if made.tied else ''}"
    folder = folder.with_name(f"{folder.name}-{made.variant.replace(' ', '_')}") if made.changes else folder
    if not folder.exists():
        write_tiny_model(folder, made.model, layers=LAYERS, width=WIDTH, dtype=made.dtype, changes=made.changes)
        if made.tied:
            _tie_head(folder)
    return folder


def refusal(cell: Cell, root: Path) -> str | None:
    """Why a user who names this reader is refused before anything is quantized; None: the work would begin."""
    made = cell.checkpoint
    try:
        planned = _PlanOnly.from_pretrained(str(source_folder(made, root)), **options(made, cell.reader))
        planned.save_pretrained(root / f"{cell.name}-not-made", measure=None)
    except _PlanAcceptedError:
        return None
    except UnsupportedModelError as err:
        return str(err)
    raise AssertionError("an export without quantized modules was written")


def export(made: Checkpoint, reader: Reader, out: Path, root: Path) -> None:
    """Write a checkpoint, for a reader that may have it."""
    with pytest.MonkeyPatch.context() as patch:
        if made.shard_bytes is not None:
            patch.setattr(writer, "write_shards", partial(write_shards, shard_bytes=made.shard_bytes))
        quantizer = FairQuantizer.from_pretrained(str(source_folder(made, root)), **options(made, reader))
        quantizer.save_pretrained(out, measure=None)
    if made.shard_bytes is not None:
        assert len(list(out.glob("*.safetensors"))) > 1


def write_request(folder: Path, path: Path) -> None:
    """The prompts for a checkpoint: random token ids, some of them long enough to fill a group."""
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in PROMPT_LENGTHS]
    path.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")


def load_original(made: Checkpoint, root: Path) -> PreTrainedModel:
    """The 16-bit model in float32."""
    original: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source_folder(made, root), dtype=torch.float32)
    return original


def options(made: Checkpoint, reader: Reader) -> dict[str, Any]:
    """Fields of `FairConfig` for a checkpoint."""
    # Rounding is quickest, and stored like all else. AWQ changes norms and 16-bit weights besides.
    fixed: dict[str, Any] = {"method": "awq" if made.format == "awq" else "rtn"}
    if made.format == "awq":
        fixed |= {"tokens_per_language": TOKENS_PER_LANGUAGE}
    return (
        fixed
        | {"protect_layers": PROTECTED, "languages": ("en", "he", "zh"), "format": made.format, "reader": reader}
        | made.options
    )


def _tie_head(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(folder)
