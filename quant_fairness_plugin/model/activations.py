"""How large a model's activations get, which decides in which 16-bit dtype it can be stored and served."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.resolve import ModelFiles

LARGEST_FLOAT16 = torch.finfo(torch.float16).max
ROW_TOKENS = 64
"""Of each sentence that is looked at."""
SPREAD_TOKENS = 40
_STEP = 7919
_logger = logging.getLogger(__name__)


def spread_ids(vocabulary: int, length: int = SPREAD_TOKENS) -> list[int]:
    """Return token ids from everywhere in a vocabulary, in steps that do not divide it; the same on every call."""
    return [(i * _STEP + 1) % vocabulary for i in range(length)]


def probe_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: Family, sentences: Sequence[str]
) -> list[list[int]]:
    """Return rows of token ids to look at a model with: ids from everywhere, and the beginning of every sentence."""
    config = model.config.get_text_config()
    longest = min(ROW_TOKENS, family.architecture.longest_input(config.to_dict()))
    rows = [spread_ids(config.vocab_size, min(SPREAD_TOKENS, longest))]
    for sentence in sentences:
        ids = tokenizer(sentence, verbose=False)["input_ids"][:longest]
        rows.append([index for index in ids if index < config.vocab_size])
    return [row for row in rows if row]


class ActivationWatch:
    """The largest magnitude that was seen; infinity where a value was NaN."""

    def __init__(self) -> None:
        self.largest = 0.0

    def see(self, value: object) -> None:
        """Look at a value, unless it is a mask or holds no floating-point numbers."""
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() and not _is_mask(value):
            peak = float(value.abs().max())
            self.largest = max(self.largest, peak if peak == peak else float("inf"))

    @contextmanager
    def over(self, root: nn.Module) -> Iterator[None]:
        """Look at what all modules below one, itself included, are given and return."""

        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
                self.see(value)

        hooks = [module.register_forward_hook(note) for module in root.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@torch.no_grad()
def largest_activation(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> float:
    """Return the largest magnitude among what the modules of a model are given and return; infinity where one is NaN.

    Args:
        model: in float32; not changed.
        rows: token ids, run one row at a time.
    """
    watch = ActivationWatch()
    with watch.over(model):
        for row in rows:
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
    return watch.largest


def _is_mask(value: Tensor) -> bool:
    """Return whether a tensor holds the lowest number of its type, as attention masks do."""
    return bool((value == torch.finfo(value.dtype).min).any()) or bool(torch.isneginf(value).any())


def _fits(value: Tensor) -> bool:
    return value.numel() == 0 or float(value.detach().abs().max()) <= LARGEST_FLOAT16  # False for NaN


def fitting_dtype(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], storage: torch.dtype, files: ModelFiles
) -> torch.dtype:
    """Return the dtype to store a model in: bfloat16 where its activations exceed float16, else the one given.

    A weight that does not fit into float16 changes nothing: rounding it says which one it is.

    Raises:
        ArtifactError: the model computes NaN or infinite values in float32 already.
    """
    if storage != torch.float16 or not all(_fits(parameter) for parameter in model.parameters()):
        return storage
    return dtype_for(largest_activation(model, rows), files)


def dtype_for(largest: float, files: ModelFiles) -> torch.dtype:
    """Return float16 where the largest activation of a float16 model fits it, else bfloat16, and say so.

    Raises:
        ArtifactError: NaN or infinity was computed.
    """
    if largest == float("inf"):
        raise ArtifactError(
            f"{files.folder}: the model computes NaN or infinite values in float32; expected finite ones. Get the "
            "files again."
        )
    if largest <= LARGEST_FLOAT16:
        return torch.float16
    _logger.warning(
        "%s: activations reach %.3g, and float16 ends at %.5g: stored and served in bfloat16",
        files.name,
        largest,
        LARGEST_FLOAT16,
    )
    return torch.bfloat16
