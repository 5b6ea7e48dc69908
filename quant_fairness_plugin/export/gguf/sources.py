"""What is written as GGUF: a checkpoint folder, or a quantized model in memory. Both give the same four things."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE
from quant_fairness_plugin.checkpoint.dequantize import open_checkpoint
from quant_fairness_plugin.checkpoint.experts import mixture_of
from quant_fairness_plugin.checkpoint.folder import read_quantization
from quant_fairness_plugin.checkpoint.formats import format_of_layout
from quant_fairness_plugin.checkpoint.formats.format import Format, StoredGrid
from quant_fairness_plugin.checkpoint.module_map import stored_name
from quant_fairness_plugin.checkpoint.readers.case import float_bits
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.contents import names_once, plain_tensors
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.wrapper import find_wrapper
from quant_fairness_plugin.quantize.grid import QuantizedTensor
from quant_fairness_plugin.quantize.quantized import QuantizedModel


class Source(Protocol):
    """Tensors by the names that files of safetensors give them."""

    @property
    def packed(self) -> Collection[str]:
        """Names of the quantized modules."""

    @property
    def plain(self) -> Collection[str]:
        """Names of the tensors in 16 or 32 bit."""

    def tensor(self, name: str) -> Tensor:
        """Return a plain tensor as files hold it."""

    def dense(self, module: str) -> Tensor:
        """Return what a quantized module stands for, float32 `[rows, cols]`."""

    def bits(self, module: str) -> int:
        """Return the bits of a quantized module, without unpacking it."""

    def quantized(self, module: str) -> QuantizedTensor:
        """Return the integers of a quantized module, on a symmetric grid or not."""


class FolderSource:
    """A checkpoint folder of ours, or of another tool whose layout is known."""

    def __init__(self, folder: Path) -> None:
        """Open a folder; its tensors are read one at a time.

        Raises:
            ArtifactError: files that are missing or malformed.
            UnsupportedModelError: another layout, or what GGUF has no place for.
        """
        self._checkpoint = open_checkpoint(folder)
        if (folder / COLUMNS_FILE).is_file():
            raise UnsupportedModelError(f"{folder} {_COLUMNS}")
        _check_parts(self._checkpoint.bare)
        if self._checkpoint.input_scales:
            raise UnsupportedModelError(f"{folder} scales activations, which GGUF cannot. Quantize with --method gptq")
        if float_bits(read_quantization(folder)[0]):
            raise UnsupportedModelError(
                f"{folder} holds floats, and blocks of GGUF are written from integers. Quantize with --scheme int"
            )
        self._modules = {self._checkpoint.stored_name(module): module for module in self._checkpoint.packed}

    @property
    def packed(self) -> Collection[str]:
        """Names of the quantized modules."""
        return self._modules

    @property
    def plain(self) -> Collection[str]:
        """Names of the tensors in 16 or 32 bit."""
        return self._checkpoint.plain

    def tensor(self, name: str) -> Tensor:
        """Return a plain tensor as files hold it."""
        return self._checkpoint.tensor(name)

    def dense(self, module: str) -> Tensor:
        """Return what a module stands for, read without the code that wrote it."""
        return self._checkpoint.dense(self._modules[module])

    def bits(self, module: str) -> int:
        """Return the bits of a module."""
        return self._stored(module)[1].bits

    def quantized(self, module: str) -> QuantizedTensor:
        """Return the integers of a module.

        Raises:
            UnsupportedModelError: input channels whose groups are permuted.
        """
        parts, stored = self._stored(module)
        size = -1 if stored.groups == 1 else -(-stored.cols // stored.groups)
        with _named(module):
            return self._form.unpack(parts, Grid(bits=stored.bits, group_size=size))

    def _stored(self, module: str) -> tuple[dict[str, Tensor], StoredGrid]:
        """Return a module's tensors as they lie in the files, and their sizes."""
        parts = self._checkpoint.parts(self._modules[module])
        with _named(module):
            return parts, self._form.grid_of(parts)

    @property
    def _form(self) -> Format:
        return format_of_layout(self._checkpoint.layout)


class OriginalSource:
    """The 16-bit model, of which nothing is quantized yet."""

    packed: Collection[str] = ()

    def __init__(self, loaded: LoadedModel) -> None:
        """Take a model; its tensors are made one at a time.

        Raises:
            UnsupportedModelError: what GGUF has no place for.
        """
        _check_parts(loaded.model)
        self._loaded = loaded
        self._names = {stored_name(name, loaded.family): name for name in names_once(loaded)}

    @property
    def plain(self) -> Collection[str]:
        """Names of its tensors."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as files hold it."""
        return self._loaded.stored(self._names[name])

    def dense(self, module: str) -> Tensor:
        """Refuse: nothing is quantized."""
        raise KeyError(module)

    def bits(self, module: str) -> int:
        """Refuse: nothing is quantized."""
        raise KeyError(module)

    def quantized(self, module: str) -> QuantizedTensor:
        """Refuse: nothing is quantized."""
        raise KeyError(module)


class ModelSource:
    """A quantized model in memory, also of widths that no checkpoint format holds."""

    def __init__(self, model: QuantizedModel) -> None:
        """Take a model; nothing is copied.

        Raises:
            UnsupportedModelError: what GGUF has no place for.
        """
        if model.columns:
            raise UnsupportedModelError(f"the model {_COLUMNS}")
        _check_parts(model.loaded.model)
        self._model = model
        self._modules = {stored_name(module, model.loaded.family): module for module in model.tensors}

    @property
    def packed(self) -> Collection[str]:
        """Names of the quantized modules."""
        return self._modules

    @cached_property
    def _plain(self) -> dict[str, Tensor]:
        return dict(plain_tensors(self._model))

    @property
    def plain(self) -> Collection[str]:
        """Names of the tensors in 16 or 32 bit."""
        return self._plain

    def tensor(self, name: str) -> Tensor:
        """Return a plain tensor as files hold it."""
        return self._plain[name]

    def dense(self, module: str) -> Tensor:
        """Return what a module stands for."""
        return self._model.dense_weight(self._modules[module])

    def bits(self, module: str) -> int:
        """Return the bits of a module."""
        return self._model.bits[self._modules[module]]

    def quantized(self, module: str) -> QuantizedTensor:
        """Return the integers of a module."""
        return self._model.tensors[self._modules[module]]


_COLUMNS = "keeps input channels in 16 bit, and GGUF has no place for them"


@contextmanager
def _named(module: str) -> Iterator[None]:
    """Refuse a module whose tensors say what GGUF cannot."""
    try:
        yield
    except (KeyError, ValueError) as err:
        raise UnsupportedModelError(f"{module} cannot be carried over: {err}") from err


def _check_parts(model: PreTrainedModel) -> None:
    if mixture_of(model) is not None or find_wrapper(model) is not None:
        raise UnsupportedModelError(
            f"this is a {type(model).__name__}; mixtures of experts, and models that also see or hear, are not written "
            "as GGUF here. Use quant-fairness recommend --as llama.cpp, and llama-quantize"
        )
