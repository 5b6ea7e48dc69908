"""Step 7, the last check: the logits of a real loader against our own reading of the files.

Two of the failures that this project guards against are silent: a loader that takes a 16-bit module for a quantized
one, or ignores a list, returns a model that runs. Only its numbers show it.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTQConfig, PreTrainedModel

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.check_files import read_config
from quant_fairness_plugin.export.dequantize import check_loading_info, load_dense_model
from quant_fairness_plugin.model.load import quiet_transformers

TOLERANCE = 1e-5
"""Largest difference of logits over the largest logit. Both sides compute in float32 from equal weights, so only the
order of additions may differ (about 1e-6); one weight group read wrongly gives more than 1e-3, garbage about 1."""
ROW_LENGTHS = (1, 17, 40)


def missing_packages(format_name: str) -> tuple[str, ...]:
    """Packages that Transformers needs for a format and that are not installed here."""
    needed = {
        "gptq": ("optimum", "gptqmodel"),
        "awq": ("gptqmodel", "accelerate"),
        "compressed-tensors": ("compressed_tensors",),
    }
    return tuple(name for name in needed.get(format_name, ()) if importlib.util.find_spec(name) is None)


def compare_with_transformers(folder: Path, *, tolerance: float = TOLERANCE) -> float:
    """Load the folder with Transformers and compare its logits with those of the dequantized model.

    Holds one model at a time.

    Args:
        folder: an export.
        tolerance: the largest relative difference that is accepted.

    Returns:
        The largest difference of logits over the largest logit.

    Raises:
        ArtifactError: Transformers reports tensors that are missing or unexpected.
        UnsupportedModelError: it loads, and computes something else.
    """
    expected = _logits(load_dense_model(folder))
    # compressed-tensors draws four progress bars on stderr, gptqmodel a banner on stdout
    with quiet_transformers(), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_exact_kernel(folder),
        )
        model, info = loaded
        check_loading_info(folder, info)
        _widen(model)
        found = _logits(model)
    largest = max(float(row.abs().max()) for row in expected)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) / largest
    if not difference <= tolerance:  # also when it is NaN
        raise UnsupportedModelError(
            f"{folder}: Transformers computes other logits than the files say (relative difference {difference:.3g}, "
            f"allowed {tolerance:g}). Do not use this checkpoint with it; --format fp16-twin loads everywhere."
        )
    return difference


def _exact_kernel(folder: Path) -> dict[str, Any]:
    """Arguments that choose gptqmodel's plain kernel: its default one on a CPU computes in bfloat16 (errors of 6 %)."""
    _, quantization = read_config(folder)
    if (quantization or {}).get("quant_method") != "gptq":
        return {}
    # Below four cores gptqmodel's thread pools do not fit each other unless this is set before its import.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    return {"quantization_config": GPTQConfig(bits=4, backend="torch"), "device_map": "cpu"}


def _widen(model: PreTrainedModel) -> None:
    """Make all floating-point parameters and buffers float32, which is exact.

    Transformers leaves those in 16 bit that it renames while loading a quantized checkpoint (GPT-NeoX's head), and
    gptqmodel its scales and biases.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> list[Tensor]:
    """Logits of fixed token rows, float32. The rows run through the vocabulary in steps that do not divide it."""
    vocabulary = model.config.get_text_config().vocab_size
    steps = torch.arange(max(ROW_LENGTHS)) * 7919 + 1
    rows = [(steps[:length] % vocabulary).unsqueeze(0) for length in ROW_LENGTHS]
    model.train(False)
    return [model(input_ids=row).logits.float() for row in rows]
