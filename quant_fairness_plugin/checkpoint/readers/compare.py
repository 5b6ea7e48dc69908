"""What a real reader computed against our own dequantizer, in units of what float16 does to our own model.

Readers compute in float16, with kernels of their own, so their log-probabilities are never ours to the last bit. The
yardstick is therefore measured for each checkpoint: the same dequantized model, run in float16 by us.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPTQConfig, PreTrainedModel

from quant_fairness_plugin.artifacts import ReaderRun
from quant_fairness_plugin.checkpoint.dequantize import (
    bare_model,
    check_loading_info,
    load_dense_model,
    overlooked_keys,
)
from quant_fairness_plugin.checkpoint.folder import read_config, weight_files
from quant_fairness_plugin.checkpoint.in_blocks import BlockLogits
from quant_fairness_plugin.checkpoint.readers.case import Case
from quant_fairness_plugin.checkpoint.readers.running import Reading, read_with
from quant_fairness_plugin.checkpoint.readers.transformers import TRANSFORMERS
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.activations import spread_ids
from quant_fairness_plugin.model.context import longest_input
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.freed import return_what_is_free, returned_when_freed
from quant_fairness_plugin.model.load import quiet_transformers
from quant_fairness_plugin.model.native import auto_class
from quant_fairness_plugin.model.storage import announced_dtype

_logger = logging.getLogger(__name__)
HALF_PRECISION_KERNELS = frozenset({"awq"})
"""Methods whose plainest kernel computes in float16, so that logits differ from ours by what that does."""
FLOAT32_BYTES = 4
UNPACKING_COPIES = 2
"""Of a matrix in float32, while compressed-tensors unpacks it."""
PROMPT_LENGTHS = (1, 2, 17, 63)
CONTINUED = 12
"""Tokens that a reader adds to a prompt."""
TOLERANCE = 2.0
"""In units of float16. vLLM measured 0.7 and 0.9 (random and trained model), gptqmodel 0.9; readers that take two other
layers for the protected one would be at 4.7 and more."""
MOST_BEHIND = 3 * TOLERANCE
"""Of a greedy token: the largest of many differences of two numbers, and not a mean. vLLM, 0.7 away, was 4.3 behind on
one kind of CPU, and below 4 on another."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a reader is from our dequantizer."""

    unit: float
    """Root mean square of what float16 changes in our own model's log-probabilities, in nats."""
    distance: float
    """Root mean square of reader minus ours, in units."""
    behind: float
    """How much less likely than our likeliest token a greedy token of the reader is, at most, in units; 0 if none."""

    @property
    def agrees(self) -> bool:
        """Whether the reader computes what the files say. False also where a number is NaN."""
        return self.distance <= TOLERANCE and self.behind <= MOST_BEHIND


def compare_with_reader(folder: Path, reader: str, python: Path) -> ReaderRun:
    """Run a reader on fixed prompts and compare it with the dequantized model.

    Args:
        folder: a checkpoint.
        reader: which one.
        python: the Python that has it.

    Returns:
        Which reader ran, and how close it is.

    Raises:
        UnsupportedModelError: the reader fails, or computes something else than the files say.
        MissingExtraError: that Python does not have the reader.
        ConfigError: the reader has no kernel for this checkpoint on this machine.
    """
    model = load_dense_model(folder)
    reading = read_with(reader, folder, fixed_prompts(model), python)
    gap = compare_reading(reading, model)
    if not gap.agrees:
        raise UnsupportedModelError(
            f"{folder}: {reader} {reading.version} computes something else than the files say: log-probabilities are "
            f"{gap.distance:.3g} float16 units away (allowed {TOLERANCE:g}), greedy tokens {gap.behind:.3g} behind "
            f"(allowed {MOST_BEHIND:g}). Do not use this checkpoint with it."
        )
    return ReaderRun(
        reader=reader,
        version=reading.version,
        dtype="float16",
        detail=f"log-probabilities within {gap.distance:.2f} float16 units of the dequantized weights "
        f"({gap.unit:.2g} nats each), greedy tokens within {gap.behind:.2f}",
    )


def fixed_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Prompts of fixed lengths with tokens from everywhere in the vocabulary, the same on every call.

    Where the model takes fewer tokens at once, the longer ones are cut to what it takes.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    lengths = _lengths(PROMPT_LENGTHS, model, room=CONTINUED)
    return [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]


def _lengths(wanted: Sequence[int], model: PreTrainedModel, *, room: int = 0) -> tuple[int, ...]:
    """Return lengths of which none, with `room` more tokens, is more than the model takes at once."""
    most = max(1, longest_input(model.config.to_dict()) - room)
    return tuple(dict.fromkeys(min(length, most) for length in wanted))


def compare_reading(reading: Reading, model: PreTrainedModel) -> Comparison:
    """Log-probabilities of a reader against those of our dequantized model, of the same tokens after the same tokens.

    Args:
        reading: what the reader said.
        model: the dequantized model in float32; not changed.
    """
    differences = _differences(reading, model)
    in_float16 = deepcopy(model).to(torch.float16)  # type: ignore[arg-type] # as in model/load.py
    unit = _rms(_differences(reading, in_float16) - differences)
    behind = max((gap for sequence in reading.sequences for gap in _behind(sequence, model)), default=0.0)
    return Comparison(unit, _rms(differences) / unit, behind / unit)


def _differences(reading: Reading, model: PreTrainedModel) -> Tensor:
    return torch.tensor([gap for sequence in reading.sequences for gap in _gaps(sequence, model)])


def _gaps(sequence: Mapping[str, Any], model: PreTrainedModel) -> Iterator[float]:
    ours = _log_probabilities(model, sequence["ids"])
    for i, predictions in enumerate(sequence["predictions"]):
        for token, value in predictions.items():
            yield value - float(ours[i, int(token)])


def _behind(sequence: Mapping[str, Any], model: PreTrainedModel) -> Iterator[float]:
    ours = _log_probabilities(model, sequence["ids"])
    first = len(sequence["ids"]) - sequence["new"]
    for i, token in enumerate(sequence["ids"][first:], start=first):
        yield float(ours[i - 1].max() - ours[i - 1, token])


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Float32 `[tokens, vocabulary]`: row i is the prediction after token i."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def _rms(differences: Tensor) -> float:
    return float(differences.square().mean().sqrt())


SAME_MODEL = 1e-5
"""Largest difference of logits over the largest logit. Both sides compute in float32 from equal weights, so only the
order of additions may differ (about 1e-6); one weight group read wrongly gives more than 1e-3, garbage about 1."""
ROW_TOKENS = 40
"""Of the row that both are run on: ids from everywhere in the vocabulary."""


def missing_packages(method: str) -> tuple[str, ...]:
    """Return the packages that Transformers needs for a `quant_method` and that are not installed here."""
    return tuple(name for name in TRANSFORMERS.needs.get(method, ()) if importlib.util.find_spec(name) is None)


def compare_with_transformers(folder: Path, *, tolerance: float = SAME_MODEL) -> ReaderRun:
    """Load the folder with Transformers and compare its logits with those of the dequantized model.

    Holds one model at a time, and of that what compressed-tensors has unpacked for one block.

    Args:
        folder: an export.
        tolerance: the largest relative difference that is accepted.

    Returns:
        Its version, and the largest difference of logits over the largest logit.

    Raises:
        ArtifactError: Transformers reports tensors that are missing or unexpected.
        UnsupportedModelError: it loads, and computes something else.
    """
    bare = bare_model(folder)
    expected = _dense_logits(folder, bare)
    return_what_is_free()
    # compressed-tensors draws four progress bars on stderr, gptqmodel a banner on stdout
    with quiet_transformers(), redirect_stderr(StringIO()), redirect_stdout(StringIO()), returned_when_freed():
        model, info = _read(folder)
        check_loading_info(folder, info, overlooked_keys(folder))
        _widen(model)
        actual = logits_block_by_block(model, detect_family(bare).blocks)
    del model
    return_what_is_free()
    difference = float((expected - actual).abs().max() / expected.abs().max())
    if not difference <= tolerance:  # also when it is NaN
        raise UnsupportedModelError(
            f"{folder}: Transformers computes other logits than the files say (relative difference {difference:.3g}, "
            f"allowed {tolerance:g}). Do not use this checkpoint with it; --format fp16-twin loads everywhere."
        )
    return ReaderRun(
        reader="transformers",
        version=transformers.__version__,
        dtype="float32",
        detail=f"logits within {difference:.2g} of the dequantized weights",
    )


def _read(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model as Transformers reads it in float32, and what it says of the tensors."""
    try:
        loaded: Any = auto_class(read_config(folder)[0]).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_exact_kernel(folder),
        )
    except RuntimeError as err:  # sizes that do not fit, and conversions that fail
        said = " ".join(str(err).split())[:200]
        raise UnsupportedModelError(
            f"{folder}: Transformers {transformers.__version__} does not load it ({said}). Do not use this checkpoint "
            "with it; --format fp16-twin loads everywhere."
        ) from err
    model, info = loaded
    return model, info


def _dense_logits(folder: Path, bare: PreTrainedModel) -> Tensor:
    """Logits of the dequantized model on the fixed row, one block of it in memory at a time where that can be."""
    try:
        # Transformers unpacks quantized experts while loading, and stacks them in the storage dtype.
        experts = announced_dtype(read_config(folder)[0])
        [logits] = BlockLogits(folder, [_row(bare)], experts=experts)
        return logits
    except UnsupportedModelError as err:
        _logger.info("%s is run as a whole: %s", folder, err)
        dense = load_dense_model(folder)
        _round_experts(dense, folder)
        return _logits(dense)


def _round_experts(model: PreTrainedModel, folder: Path) -> None:
    """Round experts to the storage dtype: Transformers unpacks quantized ones while loading, and stacks them in it."""
    stored = announced_dtype(read_config(folder)[0])
    for module in model.modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # the interface of stacked experts
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(stored).float()


def _exact_kernel(folder: Path) -> dict[str, Any]:
    """Arguments that choose gptqmodel's plain kernel: its default one on a CPU computes in bfloat16 (errors of 6 %)."""
    _, quantization = read_config(folder)
    if (quantization or {}).get("quant_method") != "gptq":
        return {}
    # Below four cores gptqmodel's thread pools do not fit each other unless this is set before its import.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    return {"quantization_config": GPTQConfig(bits=4, backend="torch"), "device_map": "cpu"}


def _widen(model: nn.Module) -> None:
    """Make all floating-point parameters and buffers float32, which is exact; those of 8 bits are codes and scales.

    Transformers leaves those in 16 bit that it renames while loading a quantized checkpoint (GPT-NeoX's head), and
    gptqmodel its scales and biases.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.data = parameter.data.float()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and buffer.element_size() > 1:
                setattr(module, name, buffer.float())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Return the logits of the fixed row, float32 `[1, tokens, vocabulary]`."""
    model.train(False)
    logits: Tensor = model(input_ids=torch.tensor([_row(model)]), use_cache=False).logits
    return logits.float()


def logits_block_by_block(model: PreTrainedModel, blocks: str) -> Tensor:
    """Return the logits of the fixed row, and leave the model without the weights of its blocks.

    compressed-tensors unpacks all modules when the model is first called, and keeps them so: the whole model would be
    in float32. Here it is asked to unpack a block when that block is called, and what a block alone has is gone behind
    it.

    Args:
        model: as Transformers read it.
        blocks: full name of the list of its decoder blocks.
    """
    listed: Any = model.get_submodule(blocks)
    _unpack_when_called(model, listed)
    parts = Counter(part for block in listed for part in set(block.modules()))
    tied = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {number for number, count in tied.items() if count > 1}
    for block in listed:
        own = [part for part in block.modules() if parts[part] == 1]
        block.register_forward_hook(partial(_let_go, own, shared))
    return _logits(model)


def _unpack_when_called(model: Any, blocks: Any) -> None:
    """Have compressed-tensors unpack what is outside the blocks now, and each block when it is called."""
    if not hasattr(model, "ct_decompress_hook"):
        return  # another format, or a version that has unpacked everything while loading
    compressor = model.hf_quantizer.compressor
    compressor.remove_decompression_hook(model)
    packed = {module for module in model.modules() if hasattr(module, "quantization_scheme")}

    def unpack(part: nn.Module, *_: object) -> None:
        for module in packed.intersection(part.modules()):
            compressor.decompress_model(module)
            _widen(module)  # FP4 is unpacked into bfloat16, whatever the model is loaded in
            packed.remove(module)

    for module in packed.difference(*(block.modules() for block in blocks)):
        unpack(module)
    for block in blocks:
        block.register_forward_pre_hook(unpack)


def held_by_transformers(folder: Path, case: Case) -> int:
    """Return the bytes that `compare_with_transformers` holds at most, about.

    That is the files, and in float32 what is not quantized, the largest block, and its largest matrix while that is
    unpacked; the whole model where Transformers reads it as float32 from the start: experts, and formats that quantize
    nothing. Beside a reader in a process of its own, the whole model is held in float32 and float16.

    Args:
        folder: an export.
        case: what its tensors and metadata say.
    """
    bare = bare_model(folder)
    sizes = {name: FLOAT32_BYTES * parameter.numel() for name, parameter in bare.named_parameters()}
    quantized = {f"{name}.weight" for name in case.modules.quantized}
    stored, whole = sum(path.stat().st_size for path in weight_files(folder)), sum(sizes.values())
    if case.method in HALF_PRECISION_KERNELS:
        return 2 * stored + whole + whole // 2
    if case.modules.experts is not None or not quantized:
        return whole
    blocks: Any = bare.get_submodule(case.family.blocks)
    largest: int = max(sum(FLOAT32_BYTES * parameter.numel() for parameter in block.parameters()) for block in blocks)
    unpacking = UNPACKING_COPIES * max(sizes[name] for name in quantized)
    return stored + largest + unpacking + sum(size for name, size in sizes.items() if name not in quantized)


def _let_go(parts: Sequence[nn.Module], shared: Collection[int], *_: object) -> None:
    for part in parts:
        for parameter in part.parameters(recurse=False):
            if id(parameter) not in shared:
                parameter.data = parameter.data.new_empty(0)


def _row(model: PreTrainedModel) -> list[int]:
    [length] = _lengths((ROW_TOKENS,), model)
    return spread_ids(model.config.get_text_config().vocab_size, length)
