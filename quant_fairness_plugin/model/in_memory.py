"""A model that is already in memory, copied as `load_model` would have loaded it from its files."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.activations import fitting_dtype, probe_rows
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.model.load import LoadedModel, from_loaded
from quant_fairness_plugin.model.native import CODE_KEYS
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.skeleton import place_buffers
from quant_fairness_plugin.model.storage import rounded, sixteen_bit

_LOCATION_KEYS = ("_name_or_path", "transformers_version")
"""What a config in memory says of where it was loaded, which an export must not repeat."""


def copy_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, sentences: Sequence[str] = ()
) -> LoadedModel:
    """Copy a model: its weights rounded to 16 bit, computed in float32, in evaluation mode, without gradients.

    The model that is given is not changed, nor does it share memory with the copy. 16-bit weights are stored as they
    are; 32-bit weights in bfloat16 where each of them is a bfloat16 value already (a checkpoint in bfloat16 that was
    loaded in float32), else in float16, and in bfloat16 where activations exceed float16. So the copy is what
    `load_model` makes of the model's own files.

    Args:
        model: a causal language model of Transformers with 16- or 32-bit weights, on one device.
        tokenizer: its tokenizer.
        sentences: texts on which the range of activations is looked at.

    Raises:
        ConfigError: no tokenizer, or something else in its place.
        UnsupportedModelError: no such model: an adapter, an unsupported architecture, a quantized model, one that is
            spread over devices or has no weights in memory, a head that its config ties and that differs from the
            embedding, or values too large for float16.
        ArtifactError: a parameter holds NaN or infinite values.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        problem = "needs its tokenizer" if tokenizer is None else f"got a {type(tokenizer).__name__} as its tokenizer"
        raise ConfigError(
            f"a model in memory {problem}; a tokenizer of Transformers is accepted. Pass "
            "tokenizer=AutoTokenizer.from_pretrained(…), or give the model's name or folder instead of the model"
        )
    if isinstance(model, PreTrainedModel):  # else the next line refuses it
        _check_device(model)
    wrapped = from_loaded(model, tokenizer)
    _check_tied(model)
    files = _described(wrapped.files, model)
    storage = _storage_dtype(model)
    parameters = {
        id(parameter): nn.Parameter(
            rounded(parameter.detach(), name, files, storage=storage).to(torch.float32, copy=True), requires_grad=False
        )
        for name, parameter in model.named_parameters()
    }
    # deepcopy takes these instead of copying the parameters first, and tied ones stay tied.
    copied = copy.deepcopy(model, dict(parameters))
    copied.train(False)
    _restore_tables(copied, wrapped.family, files)
    fitting = fitting_dtype(copied, probe_rows(copied, wrapped.tokenizer, wrapped.family, sentences), storage, files)
    if fitting != storage:
        storage = fitting
        for (name, parameter), original in zip(copied.named_parameters(), model.parameters(), strict=True):
            parameter.data = rounded(original.detach(), name, files, storage=storage).float()
    return replace(wrapped, files=files, model=copied, storage_dtype=storage)


def _check_device(model: PreTrainedModel) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the model's weights are spread over {', '.join(devices)}; models on one device are accepted. Load it "
            "without device_map, or give its name or folder"
        )


def _check_tied(model: PreTrainedModel) -> None:
    ends: tuple[nn.Module | None, ...] = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    weights = [end.weight for end in ends if end is not None]
    if getattr(model.config, "tie_word_embeddings", False) and len({id(weight) for weight in weights}) > 1:
        raise UnsupportedModelError(
            "the config says tie_word_embeddings, and the model's head is not its embedding: a loader would drop one "
            "of the two. Call model.tie_weights(), or set model.config.tie_word_embeddings = False"
        )


def _described(files: ModelFiles, model: PreTrainedModel) -> ModelFiles:
    """Return the description of the model as its files would give it, wherever it was loaded from."""
    name = Path(files.name).resolve().name if os.path.isdir(files.name) else files.name
    config = {key: value for key, value in files.config.items() if key not in (*_LOCATION_KEYS, *CODE_KEYS)}
    # A model that was never saved does not say its class, and vLLM looks for nothing else.
    config["architectures"] = config.get("architectures") or [type(model).__name__]
    return replace(files, name=name, config=config)


def _storage_dtype(model: PreTrainedModel) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=lambda dtype: sizes[dtype])
    if most == torch.float32 and all(_is_bfloat16(parameter.detach()) for parameter in model.parameters()):
        return torch.bfloat16
    return sixteen_bit(most)


def _is_bfloat16(value: Tensor) -> bool:
    return torch.equal(value.to(torch.bfloat16).to(value.dtype), value)


def _restore_tables(model: PreTrainedModel, family: Family, files: ModelFiles) -> None:
    """Compute again, in float32, what `model.half()` or `model.to(dtype)` rounded with the weights: rotary tables.

    Whoever loads the checkpoint computes them in float32.
    """
    stored = model.state_dict().keys()
    tables = {name: value for name, value in model.named_buffers() if name not in stored and family.owns(name)}
    coarse = {name for name, value in tables.items() if value.is_floating_point() and value.dtype != torch.float32}
    if not coarse:
        return
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    place_buffers(skeleton, family, files, {}, "cpu")
    for name in coarse:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = skeleton.get_buffer(name).to(tables[name].device, torch.float32)
