"""Whether a checkpoint computes in the dtype that its config says what it computes in float32."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.checkpoint.dequantize import bare_model, model_from_state, read_dense_state
from quant_fairness_plugin.checkpoint.folder import read_config
from quant_fairness_plugin.checkpoint.in_blocks import BlockLogits
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.activations import spread_ids
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.storage import announced_dtype

_logger = logging.getLogger(__name__)
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
    error = _relative_change(*(_logits(folder, bare, rows, kind) for kind in (torch.float32, dtype)))
    if not error <= SERVED_TOLERANCE:  # also when it is NaN
        what = f"logits that are {error:.3g} off" if error == error else "NaN or infinite values"
        raise ArtifactError(
            f"{folder}: in {name}, which its config.json says it is served in, it computes {what}; accepted are finite "
            f"ones within {SERVED_TOLERANCE:g} of float32. Convert the source to bfloat16 and quantize that."
        )
    return f"{name}: logits within {error:.2g} of float32 on {len(rows)} rows"


def _logits(folder: Path, bare: PreTrainedModel, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterable[Tensor]:
    """Return the logits of the dequantized model in a dtype, as Transformers computes it, tables included."""
    try:
        return BlockLogits(folder, rows, dtype=dtype)
    except UnsupportedModelError as err:
        _logger.info("%s is run as a whole: %s", folder, err)
        return _whole_logits(model_from_state(folder, bare, read_dense_state(folder), dtype=dtype), rows)


@torch.no_grad()
def _whole_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits.float() for row in rows]


def _relative_change(expected: Iterable[Tensor], served: Iterable[Tensor]) -> float:
    """Return the root mean square of the differences over that of the expected logits less their mean."""
    change = spread = 0.0
    for logits, computed in zip(expected, served, strict=True):
        change += float((computed - logits).square().sum(dtype=torch.float64))
        spread += float((logits - logits.mean(-1, keepdim=True)).square().sum(dtype=torch.float64))
    return math.sqrt(change / spread) if spread else math.nan
