"""Loading: a name or a model in memory in, a `LoadedModel` that every later step works on out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.errors import ArtifactError, ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.model.activations import fitting_dtype, probe_rows
from quant_fairness_plugin.model.experts import unfold_experts, with_unfolded_experts
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.model.linear import is_conv1d, is_linear, linear_weight, set_linear_weight
from quant_fairness_plugin.model.native import auto_class
from quant_fairness_plugin.model.quiet import quiet_transformers
from quant_fairness_plugin.model.reading import read_tensor
from quant_fairness_plugin.model.resolve import HEAD_ADVICE, ModelFiles, resolved
from quant_fairness_plugin.model.stacked_files import single_shapes, single_tensors
from quant_fairness_plugin.model.storage import (
    parameters_sha256,
    round_parameters,
    sixteen_bit,
    storage_dtype,
)
from quant_fairness_plugin.model.unread import sort_names

__all__ = [
    "LoadedModel",
    "check_device",
    "check_keys",
    "check_layer_count",
    "compute_dtype",
    "empty_model",
    "from_loaded",
    "is_conv1d",
    "is_linear",
    "linear_weight",
    "load_model",
    "load_tokenizer",
    "quiet_transformers",
    "say_untied",
    "set_linear_weight",
]

_logger = logging.getLogger(__name__)
_COMPUTE = (torch.float32, torch.float16, torch.bfloat16)
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)
"""What Transformers raises for a checkpoint or config that it cannot use; they have no common base class."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model with its tokenizer and its map."""

    files: ModelFiles
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    storage_dtype: torch.dtype
    """`torch.float16` or `torch.bfloat16`: what an export stores the unquantized weights in."""

    @property
    def layers(self) -> int:
        """How many decoder blocks the model has."""
        return self.files.layers

    def block(self, layer: int) -> nn.Module:
        """Return one decoder block.

        Raises:
            InvalidLayerError: the layer is not in `0..layers - 1`.
        """
        if not 0 <= layer < self.layers:
            raise InvalidLayerError(
                f"layer {layer} does not exist: the model has {self.layers} layers, 0..{self.layers - 1}."
            )
        return self.model.get_submodule(f"{self.family.blocks}.{layer}")

    @property
    def parameters(self) -> int:
        """How many numbers the model holds; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def matrix(self, module: str) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of a linear module, by its full name."""
        rows, cols = linear_weight(self.model.get_submodule(module)).shape
        return rows, cols

    def table_shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of the embedding, and of a head of its own."""
        return self.family.table_shapes({name: value.shape for name, value in self.model.named_parameters()})

    def stored(self, name: str) -> Tensor:
        """Return a parameter or buffer as an export stores it: on the CPU, floats in the storage dtype; a copy."""
        value: Tensor = self.model.state_dict()[name]
        return value.to("cpu", self.storage_dtype if value.is_floating_point() else value.dtype, copy=True)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Return the linear modules of a layer by full name, in forward order.

        Raises:
            InvalidLayerError: the layer is not in `0..layers - 1`.
        """
        block = self.block(layer)
        names = zip(self.family.full_names(layer), self.family.modules(layer), strict=True)
        return {full: block.get_submodule(relative) for full, relative in names}


def load_model(
    name: str | ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    sentences: Sequence[str] = (),
    storage: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model for measuring and quantizing: its weights rounded to 16 bit, computed in `dtype`.

    The rounding makes "the 16-bit model" exact: a float32 checkpoint is rounded first, as an export would store it: to
    the 16-bit dtype that its config says, else to float16, and to bfloat16 where activations exceed float16. The model
    is in evaluation mode and takes no gradients.

    Args:
        name: a bundled name, a folder, a `.safetensors` file (its folder is the model) or a Hub id; or the files that
            `resolve_model` returned for one, which are not resolved again.
        dtype: what the model computes in; None is float32.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run the model code that the checkpoint brings along.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file (with `weights_only`).
        device: where the model goes after loading.
        sentences: texts on which the range of its activations is looked at, beside token ids from everywhere.
        storage: what the weights are rounded to; None decides by files and activations.

    Raises:
        ConfigError: no such model, a dtype that is not computed in, or a device that this machine does not have.
        UnsupportedModelError: an architecture that is not supported, or values too large for float16.
        ArtifactError: missing, malformed, surplus or non-finite tensors.
        ExternalServiceError: the Hub failed.
    """
    compute = compute_dtype(dtype)
    check_device(device)
    files = resolved(name, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    stored = storage_dtype(files)
    model = _load_weights(files, trust_remote_code)
    family = detect_family(model)
    check_layer_count(files, model, family)
    say_untied(files, model, family)
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    if storage is None:
        storage = fitting_dtype(model, probe_rows(model, tokenizer, family, sentences), stored, files)
    round_parameters(model, files, family, storage=storage, compute=compute)
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
    return LoadedModel(files, model, tokenizer, family, storage)


def from_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Wrap a model that is already in memory. The model itself is not changed, nor rounded to 16 bit.

    Of a mixture of experts, the wrapped model is another object of the same tensors, with its experts unfolded.

    Raises:
        UnsupportedModelError: an architecture that is not supported, a quantized model, or one without weights.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Transformers model; expected a causal language model of Transformers. "
            "Unwrap it (an adapter: peft's merge_and_unload)."
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise UnsupportedModelError("the model is already quantized; expected a 16- or 32-bit model. Load that one.")
    model = with_unfolded_experts(model)
    family = detect_family(model)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    weight = linear_weight(blocks[0].get_submodule(family.modules(0)[0]))
    if weight.is_meta or weight.dtype not in _COMPUTE:
        raise UnsupportedModelError(
            f"the model's weights are {'on the meta device' if weight.is_meta else weight.dtype}; expected float16, "
            "bfloat16 or float32 weights in memory. Load the model with its weights."
        )
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    files = ModelFiles(
        name=name,
        folder=Path("<memory>"),
        config=model.config.to_dict(),
        weights=(),
        layers=len(blocks),
        revision=None,
        memory_sha256=parameters_sha256(model),
    )
    return LoadedModel(files, model, tokenizer, family, sixteen_bit(weight.dtype))


def empty_model(
    files: ModelFiles, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the model's modules on the meta device: its structure without reading or allocating a weight.

    Experts are unfolded.

    Args:
        files: the model.
        trust_remote_code: run the model code that the checkpoint brings along.
        dtype: of the parameters; None is the config's.

    Raises:
        ArtifactError: a config that Transformers cannot read.
        UnsupportedModelError: an architecture that Transformers does not know as a causal language model.
    """
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=trust_remote_code)
            if files.source is not None:  # or Transformers would quantize the model that is built
                del config.quantization_config
    except _LOAD_ERRORS as err:
        raise ArtifactError(f"{files.folder / 'config.json'}: {_one_line(err)}. Restore the model's file.") from err
    try:
        with quiet_transformers(), torch.device("meta"):
            model: PreTrainedModel = auto_class(files.config).from_config(
                config, trust_remote_code=trust_remote_code, **({} if dtype is None else {"dtype": dtype})
            )
    except _LOAD_ERRORS as err:
        raise UnsupportedModelError(
            f"{files.name}: cannot be built as a causal language model ({_one_line(err)}). Use a decoder-only model."
        ) from err
    unfold_experts(model)
    return model


def compute_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to compute in; None is float32.

    Raises:
        ConfigError: a dtype that is not computed in.
    """
    if dtype is not None and dtype not in _COMPUTE:
        raise ConfigError(f"dtype {dtype} cannot be computed in; use float32, float16 or bfloat16")
    return torch.float32 if dtype is None else dtype


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: torch cannot use it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:  # torch asserts that it was built for the device
        raise ConfigError(
            f"device {device!r} cannot be used ({_one_line(err)}); expected cpu or an accelerator of this machine. "
            "Use cpu, or install a torch build for the device."
        ) from err


def _load_weights(files: ModelFiles, trust_remote_code: bool) -> PreTrainedModel:
    # Building the empty model first tells a bad config (5), an unsupported architecture (3) and bad weights (5) apart.
    bare = empty_model(files, trust_remote_code=trust_remote_code)
    family = detect_family(bare)
    try:
        with quiet_transformers():
            # Transformers would compute with the weights of 8 or 4 bits in the folder: they are read here instead.
            decoded = {} if files.source is None else {"config": bare.config, "state_dict": _decoded(files)}
            build: Any = type(bare) if decoded else auto_class(files.config)
            loaded: Any = build.from_pretrained(
                None if decoded else files.folder,
                dtype=torch.float32,  # exact for every 16-bit checkpoint
                use_safetensors=files.weights[0].suffix == ".safetensors",
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below, where Transformers only points at its log
                **decoded,
            )
    except _LOAD_ERRORS as err:
        raise ArtifactError(
            f"{files.folder}: the weights do not load ({_one_line(err)}). Get the files again."
        ) from err
    model: PreTrainedModel
    model, info = loaded
    if files.weights[0].suffix == ".safetensors" and not info["missing_keys"]:
        info = info | {"unexpected_keys": set(sort_names(bare, family, single_shapes(files)).strays)}
    check_keys(files, info)
    unfold_experts(model)
    return model


def _decoded(files: ModelFiles) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint in 8 or 4 bits, as bfloat16 values."""
    return {name: read_tensor(place) for name, place in single_tensors(files).items()}


def say_untied(files: ModelFiles, model: PreTrainedModel, family: Family) -> None:
    """Log where the file holds a head of its own although the config ties it to the embedding."""
    if getattr(model.config, "tie_word_embeddings", False) and not family.tied_head:
        _logger.warning(
            "%s: config.json says tie_word_embeddings, and the file holds a head of its own, other than the embedding: "
            "it is used, as Transformers does, and exported with tie_word_embeddings false",
            files.name,
        )


def check_keys(files: ModelFiles, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not hold exactly the model's tensors; Transformers would fill gaps at random.

    Args:
        files: the model.
        info: names under `missing_keys` and `unexpected_keys`, and tuples that begin with one under `mismatched_keys`.

    Raises:
        ArtifactError: says how many tensors are missing, unexpected or of another shape, and names the first.
    """
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
    }
    differences = [f"{len(keys)} {what}: {', '.join(keys[:5])}" for what, keys in problems.items() if keys]
    if differences:
        advice = "Get matching files."
        if len(problems["missing"]) == 1 and "head" in problems["missing"][0]:
            advice = f"{HEAD_ADVICE} {advice}"
        raise ArtifactError(
            f"{files.folder}: the tensors are not those of the config ({'; '.join(differences)}). {advice}"
        )


def check_layer_count(files: ModelFiles, model: PreTrainedModel, family: Family) -> None:
    """Refuse a config that counts its layers wrongly.

    Raises:
        ArtifactError: the model that is built from it has another number of blocks.
    """
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    if len(blocks) != files.layers:
        raise ArtifactError(
            f"{files.folder / 'config.json'}: says {files.layers} layers, the model has {len(blocks)}. Correct it."
        )


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer.

    Raises:
        ArtifactError: it does not load.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                files.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except _LOAD_ERRORS as err:
        raise ArtifactError(
            f"{files.folder}: the tokenizer does not load ({_one_line(err)}). Put the model's tokenizer files there."
        ) from err
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _one_line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
