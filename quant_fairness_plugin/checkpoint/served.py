"""Whether a checkpoint computes in the dtype that its config says what it computes in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.checkpoint.dequantize import bare_model, model_from_state, read_dense_state
from quant_fairness_plugin.checkpoint.folder import read_config
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.activations import spread_ids
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.storage import announced_dtype

SERVED_TOLERANCE = 0.7
"""Root mean square of what the dtype changes in the logits, over that of the logits less their mean.

Half of 1.4, which logits of another model would be at. Small random models are at .01 in bfloat16, and at .3 where one
channel of the residual stream is a million times larger than the others; those compute so in the source, too.
"""


def compare_served(folder: Path, rows: Sequence[Sequence[int]] = ()) -> str:
    """Run the dequantized model of a folder in float32 and in the dtype of its config, and compare the logits.

    Args:
        folder: a checkpoint.
        rows: token ids to run it on, beside ids from everywhere in the vocabulary.

    Returns:
        One sentence about how close the two are.

    Raises:
        ArtifactError: NaN, infinite values or other logits in the dtype that the folder would be served in.
    """
    config, _ = read_config(folder)
    dtype = announced_dtype(config) or torch.float32
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        return "config.json says float32"
    bare = bare_model(folder)
    longest = longest_input(bare.config.to_dict())
    rows = [row[:longest] for row in (spread_ids(bare.config.get_text_config().vocab_size), *rows)]
    expected, served = (_logits(_load(folder, bare, kind), rows) for kind in (torch.float32, dtype))
    change = [found - logits for found, logits in zip(served, expected, strict=True)]
    error = _rms(change) / _rms([logits - logits.mean(-1, keepdim=True) for logits in expected])
    if not error <= SERVED_TOLERANCE:  # also when it is NaN
        what = f"logits that are {error:.3g} off" if error == error else "NaN or infinite values"
        raise ArtifactError(
            f"{folder}: in {name}, which its config.json says it is served in, it computes {what}; accepted are finite "
            f"ones within {SERVED_TOLERANCE:g} of float32. Convert the source to bfloat16 and quantize that."
        )
    return f"{name}: logits within {error:.2g} of float32 on {len(rows)} rows"


def _load(folder: Path, bare: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the dequantized model as Transformers loads it in a dtype, tables that it computes included."""
    return model_from_state(folder, bare, read_dense_state(folder), dtype=dtype)


@torch.no_grad()
def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits.float() for row in rows]


def _rms(values: Sequence[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values]).square().mean().sqrt())
