"""The independent reading: dense weights from the files of an export alone.

This is what every other reader is compared with, so it shares no code with the packing that wrote the files, nor with
the loaders (see `dense_modules`). It also reads the folders of other tools.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from quant_fairness_plugin.checkpoint.dense_modules import MARKERS, Layout, dense_weight, tensor_layout
from quant_fairness_plugin.checkpoint.experts import loaded_module, stored_module
from quant_fairness_plugin.checkpoint.folder import check_headers, read_quantization, weight_files
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError
from quant_fairness_plugin.model.experts import unfold_experts
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.linear import is_conv1d, is_linear, linear_weight
from quant_fairness_plugin.model.load import quiet_transformers
from quant_fairness_plugin.model.native import auto_class
from quant_fairness_plugin.model.reading import Place, places_of_file, read_tensor
from quant_fairness_plugin.model.unread import LoadedNames, sort_names
from quant_fairness_plugin.model.wrapper import Wrapper, find_wrapper


def read_dense_state(folder: Path) -> dict[str, Tensor]:
    """The whole model as float32 tensors on the CPU, by the parameter names of the unquantized model.

    Args:
        folder: a checkpoint in one of the layouts of `dense_modules`, or a plain one.

    Raises:
        ArtifactError: files that are missing or malformed.
        UnsupportedModelError: another quantization method or layout.
    """
    return dict(iterate_dense(folder))


def iterate_dense(folder: Path, *, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """As `read_dense_state`, one tensor at a time; with `names`, no others are read."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.plain:
        if names is not None and name not in names:
            continue
        tensor = checkpoint.tensor(name)
        yield name, tensor.float() if tensor.is_floating_point() else tensor
    for module in checkpoint.packed:
        if names is not None and f"{checkpoint.stored_name(module)}.weight" not in names:
            continue
        weight = checkpoint.dense(module)
        is_transposed = is_conv1d(checkpoint.bare.get_submodule(module))
        yield f"{checkpoint.stored_name(module)}.weight", weight.t().contiguous() if is_transposed else weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint, opened but not read: which of them stand for which module."""

    bare: PreTrainedModel
    """The unquantized architecture, on the meta device; who runs the checkpoint block by block reads blocks into it."""
    layout: Layout
    plain: tuple[str, ...]
    """Tensors that are stored as the model holds them, biases included."""
    packed: Mapping[str, tuple[str, ...]]
    """Quantized module → suffixes of its tensors. Modules have the names of the model, tensors those of the files."""
    input_scales: Mapping[str, Tensor]
    """Quantized module → what its inputs are divided by, with AutoAWQ."""
    places: Mapping[str, Place]
    """Tensor name → where it is. Nothing is mapped into memory, so that what was read can be given back."""
    wrapper: Wrapper | None = None
    """Where the text decoder is in a model of several parts."""

    def stored_name(self, module: str) -> str:
        """The name in files of a quantized module."""
        return stored_module(self.bare, module) if self.wrapper is None else self.wrapper.stored_name(module)

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return read_tensor(self.places[name])

    def parts(self, module: str) -> dict[str, Tensor]:
        """The tensors that stand for one quantized module's weight, by suffix."""
        return {suffix: self.tensor(f"{self.stored_name(module)}.{suffix}") for suffix in self.packed[module]}

    def dense(self, module: str) -> Tensor:
        """One quantized module's weight `[rows, cols]` in float32.

        Raises:
            ArtifactError: tensors that are missing or do not fit together.
        """
        weight = dense_weight(module, self.parts(module), self.layout)
        return weight / self.input_scales[module] if module in self.input_scales else weight


def open_checkpoint(folder: Path, *, dtype: torch.dtype | None = None) -> Checkpoint:
    """Sort the tensors of a folder by what they stand for, from its headers and metadata.

    Args:
        folder: an export, or a folder of another tool.
        dtype: of the architecture that comes with it; None takes the config's.

    Raises:
        ArtifactError: files that are missing or malformed.
        UnsupportedModelError: another quantization method or layout.
    """
    folder = Path(folder)
    shapes = check_headers(folder)
    quantization, _ = read_quantization(folder)
    layout = tensor_layout(quantization) if quantization else "compressed-tensors"
    bare = bare_model(folder, dtype=dtype)
    wrapper = find_wrapper(bare)
    places = {name: place for path in weight_files(folder) for name, place in places_of_file(path)}

    def loaded(name: str) -> str:
        return loaded_module(bare, name) if wrapper is None else wrapper.loaded_name(name)

    markers = MARKERS[layout] if quantization else ()
    packed: dict[str, tuple[str, ...]] = {loaded(name): () for name in quantized_modules(shapes, markers)}
    unread = set(unread_tensors(shapes, bare))
    extra = extra_tensors(shapes.keys() - unread, packed, bare)
    plain = []
    for name in shapes:
        stored, suffix = module_and_suffix(name)
        module = loaded(stored)
        if module in packed and suffix != "bias":
            packed[module] += (suffix,)
        elif name not in extra and name not in unread:
            plain.append(name)
    return Checkpoint(
        bare=bare,
        layout=layout,
        plain=tuple(plain),
        packed=packed,
        input_scales=_input_scales({name: read_tensor(places[name]) for name in extra}, bare),
        places=places,
        wrapper=wrapper,
    )


def quantized_modules(names: Iterable[str], markers: Collection[str]) -> list[str]:
    """The modules that have a tensor with one of these suffixes, by their names in files."""
    modules = {module: None for module, suffix in map(module_and_suffix, names) if suffix in markers}
    return list(modules)


def module_and_suffix(name: str) -> tuple[str, str]:
    """A tensor's name in files, parted after the module: `weight.absmax` is one suffix of bitsandbytes."""
    module, dot, rest = name.partition(".weight.")
    if dot:
        return module, f"weight.{rest}"
    module, _, suffix = name.rpartition(".")
    return module, suffix


def load_dense_model(folder: Path) -> PreTrainedModel:
    """The model that an export stands for, in float32 on the CPU, without any quantization code of another package.

    Args:
        folder: an export in any of our formats.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
    """
    folder = Path(folder)
    return model_from_state(folder, bare_model(folder), read_dense_state(folder), dtype=torch.float32)


def model_from_state(
    folder: Path, bare: PreTrainedModel, state: Mapping[str, Tensor], *, dtype: torch.dtype
) -> PreTrainedModel:
    """A model in evaluation mode on the CPU, with exactly these tensors and the folder's generation settings.

    Args:
        folder: where the tensors come from.
        bare: the unquantized architecture.
        state: its tensors by the names of checkpoints.
        dtype: what the model computes in; floating-point tensors are converted.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
    """
    with quiet_transformers():
        loaded: Any = type(bare).from_pretrained(
            None, config=bare.config, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
        model: PreTrainedModel = loaded[0]
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    check_loading_info(folder, loaded[1])
    model.train(False)
    return model


def bare_model(folder: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The unquantized architecture of an export, on the meta device, its experts unfolded.

    Its dtype is the config's where none is given.

    Raises:
        ArtifactError: a config that Transformers cannot build a model from.
    """
    try:
        with quiet_transformers(), torch.device("meta"):
            config = _plain_config(folder)
            build: Any = auto_class(config.to_dict()).from_config
            model: PreTrainedModel = build(config, **({} if dtype is None else {"dtype": dtype}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as err:
        reason = " ".join(str(err).split())[:200]
        raise ArtifactError(
            f"{folder / 'config.json'}: describes no model that can be built ({reason}). Restore the exported file."
        ) from err
    unfold_experts(model)
    return model


def check_loading_info(folder: Path, info: Mapping[str, Any], overlooked: Collection[str] = ()) -> None:
    """Refuse a load in which Transformers would have filled gaps with random numbers.

    Args:
        folder: what was loaded.
        info: what Transformers reports.
        overlooked: names of tensors that may be there, though no module has them.

    Raises:
        ArtifactError: tensors that are missing, unexpected or of another shape.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted({str(key) for key in info.get(problem) or ()}.difference(overlooked))
        if keys:
            raise ArtifactError(
                f"{folder}: {problem.replace('_', ' ')}: {', '.join(keys[:5])} ({len(keys)} in all); the files do not "
                "hold exactly the model's tensors. Export again."
            )


def _plain_config(folder: Path) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def unread_tensors(names: Iterable[str], bare: PreTrainedModel) -> list[str]:
    """Tensors that no module of the model has, and that a genuine checkpoint of it may hold: they are only copied.

    Args:
        names: of all tensors of the checkpoint.
        bare: the unquantized architecture.
    """
    return sort_names(bare, detect_family(bare), names).unread


def overlooked_keys(folder: Path) -> set[str]:
    """What Transformers may rightly call unexpected in a folder: tensors that are only copied, by all their names."""
    bare = bare_model(folder)
    unread, names = unread_tensors(check_headers(folder), bare), LoadedNames(bare)
    return {*unread, *(names.find(name) for name in unread)}


def extra_tensors(names: Iterable[str], packed: Collection[str], bare: PreTrainedModel) -> tuple[str, ...]:
    """Tensors that the architecture does not have, and that the tools are known to write all the same.

    These are AutoGPTQ's biases of modules without one, AutoAWQ's scales of activations, and what the architecture
    itself tells Transformers to overlook. Anything else that is too much stays, to be reported as unexpected.

    Args:
        names: of all tensors of the checkpoint.
        packed: the quantized modules.
        bare: the unquantized architecture.
    """
    known = set(bare.state_dict())
    overlooked = [re.compile(pattern) for pattern in bare._keys_to_ignore_on_load_unexpected or ()]
    modules = {name for name, _ in bare.named_modules()}
    extra = []
    for name in names:
        module, _, suffix = name.rpartition(".")
        bias = suffix == "bias" and module in packed
        scales = suffix == "scales" and module in modules and module not in packed
        if name not in known and (bias or scales or any(pattern.search(name) for pattern in overlooked)):
            extra.append(name)
    return tuple(extra)


def _input_scales(extra: Mapping[str, Tensor], bare: PreTrainedModel) -> dict[str, Tensor]:
    """Module → what its inputs are divided by, from the scales of the activation before it; those of ones are left out.

    Raises:
        UnsupportedModelError: scales of which it is not certain whose inputs they divide.
        ArtifactError: a bias that is not zero, for a module that has none.
    """
    scaled: dict[str, Tensor] = {}
    for name, tensor in extra.items():
        owner, _, suffix = name.rpartition(".")
        if suffix == "bias" and bool((tensor != 0).any()):
            raise ArtifactError(f"{name} is not zero, and the model has no such bias. Export again.")
        if suffix != "scales" or bool((tensor == 1).all()):
            continue
        parent = owner.rpartition(".")[0]
        after = [
            f"{parent}.{child}"
            for child, module in bare.get_submodule(parent).named_children()
            if is_linear(module) and linear_weight(module).shape[1] == tensor.numel()
        ]
        if len(after) != 1:
            raise UnsupportedModelError(
                f"{name} scales an activation, and {len(after)} modules could follow it; exactly one is needed. "
                "Export again without activation scales."
            )
        scaled[after[0]] = tensor.float().flatten()
    return scaled
