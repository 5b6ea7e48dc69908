"""What the seeds' calls compute in, whatever the caller's model is stored in."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from quant_fairness_plugin.model.load import LoadedModel


def in_float32(loaded: LoadedModel) -> LoadedModel:
    """Return the same model in float32, a copy where it is not: the weights are the same, and so is its checksum.

    16-bit arithmetic is slow on a CPU, and its rounding would be measured with the damage.
    """
    if loaded.model.dtype == torch.float32:
        return loaded
    return replace(loaded, model=copy.deepcopy(loaded.model).to(torch.float32))  # type: ignore[arg-type]
