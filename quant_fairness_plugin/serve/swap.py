"""Our kernels in a model that Transformers loaded with another package's quantization code."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.checkpoint.dense_modules import Layout
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.serve.kernels import Kernel, choose_kernel
from quant_fairness_plugin.serve.linear import QuantizedLinear, check_protected, put_module
from quant_fairness_plugin.serve.planes import reason_against, stored_planes

COMPRESSED_TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
AWQ = ("qweight", "qzeros", "scales")
UNCHANGED = {"TorchLinear": GPTQ, "AwqTorchLinear": AWQ}
"""Gptqmodel's classes that keep the tensors of the file; its others repack them, each in its own way."""
_logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    layout: Layout
    parts: dict[str, Tensor]


def use_kernels(model: PreTrainedModel, *, kernel: Kernel = "auto") -> PreTrainedModel:
    """Replace the quantized linear modules of a model that Transformers has loaded, in place.

    Known are those of `compressed-tensors` (pack-quantized, weights only), before the model's first forward pass, in
    which that package unpacks all weights, and gptqmodel's plain ones (`TorchLinear`, `AwqTorchLinear`: load with
    `backend="torch"`). All others are refused by name, before anything is
    changed. What the kernels cannot compute with (8-bit modules, above all) stays as it was loaded.

    Args:
        model: keeps its device and type. In float32 the CPU path multiplies with the exact dequantized weights.
        kernel: `auto` is the Triton kernels for a model on a GPU and the CPU path elsewhere; `reference` is the CPU
            path for a model in float32.

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown kernel, or one that cannot run on this model; says what is missing.
        UnsupportedModelError: no quantized modules, an unknown one, or a protected one that holds no plain weight of
            the model's type.
    """
    dtype, device = model.dtype, model.device
    choice = choose_kernel(kernel, dtype, device=device)
    entries = {name: _read(name, module) for name, module in model.named_modules()}
    quantized = {name: entry for name, entry in entries.items() if entry is not None}
    if not quantized:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no quantized linear modules; expected those of compressed-tensors or "
            "gptqmodel. Load a quantized checkpoint."
        )
    check_protected(model, dtype=dtype, replaced=quantized)
    on_cpu = choice.kernel != "triton"
    for name, (layout, parts) in quantized.items():
        reason = reason_against(parts, layout)
        if reason is not None:
            _logger.info("%s stays as it was loaded: %s", name, reason)
            continue
        planes = stored_planes(parts, layout, dtype=None if on_cpu else dtype)
        old = model.get_submodule(name)
        linear = QuantizedLinear(planes, bias=_bias(old), dtype=dtype, on_cpu=on_cpu)
        put_module(model, name, linear.to(device))
    return model


def _read(name: str, module: nn.Module) -> _Found | None:
    """The packed tensors of one module; None for one that is not quantized.

    Raises:
        UnsupportedModelError: a quantized module of an unknown kind.
    """
    kind = type(module)
    if hasattr(module, "quantization_scheme"):
        return _read_compressed_tensors(name, module)
    if not hasattr(module, "qweight"):
        return None
    suffixes = UNCHANGED.get(kind.__name__) if kind.__module__.split(".")[0] == "gptqmodel" else None
    if suffixes is None:
        raise UnsupportedModelError(
            f"{name} is a {kind.__module__}.{kind.__name__}, whose tensors are not read here; accepted are "
            f"compressed-tensors, and gptqmodel's {', '.join(UNCHANGED)}. Load the model with backend='torch', or the "
            "folder with load_quantized."
        )
    if suffixes == AWQ:
        return _Found("awq", _parts(module, AWQ))
    known: Any = module
    return _Found("gptq" if known.qzero_format() == 1 else "gptq_v2", _parts(module, GPTQ))


def _read_compressed_tensors(name: str, module: nn.Module) -> _Found:
    parts = _parts(module, COMPRESSED_TENSORS)
    scheme: Any = module.quantization_scheme
    if "weight_packed" not in parts:
        raise UnsupportedModelError(
            f"{name} is no longer packed: compressed-tensors unpacks weights in the first forward pass, and "
            "with run_compressed=False while loading. Call use_kernels on a freshly loaded model."
        )
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise UnsupportedModelError(
            f"{name} has quantized activations; the kernels quantize weights only. Load a checkpoint without them."
        )
    return _Found("compressed-tensors", parts)


def _parts(module: nn.Module, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = {suffix: getattr(module, suffix, None) for suffix in suffixes}
    return {suffix: tensor.detach() for suffix, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
