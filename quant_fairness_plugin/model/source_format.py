"""Checkpoints whose weights have 8 or 4 bits with scales, and that are read as 16-bit models. No torch.

FP8 (blocks of DeepSeek, channels or tensors of compressed-tensors and fbgemm) and MXFP4 (gpt-oss) are published as the
original of a model: there is no other one. Their values are small floating-point numbers times a scale, so a 16-bit
model can be read out of them; `coded` does. Integers on a grid (gptq, awq, bitsandbytes) were fitted to calibration
text, and their original exists: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quant_fairness_plugin.model.headers import TensorShapes

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Types of FP8 weights as safetensors writes them."""
SCALES = ("_scale_inv", "_scale")
"""What follows an FP8 weight's name in that of its scale. Both multiply, whatever the first one's name says."""
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"
"""What follows a weight's name in those of its MXFP4 tensors."""
_SERVING_SCALES = (".input_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale")
"""Scales of activations and of the cache, which only servers of the quantized checkpoint use."""
_MXFP4_VALUES = 32
"""Numbers of a group: 16 bytes of two numbers each."""
_BYTES = 16
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json that say how a checkpoint is quantized."""


@dataclass(frozen=True, slots=True)
class SourceFormat:
    """How the weights of a checkpoint are stored that is read as a 16-bit model."""

    name: str
    """`FP8` or `MXFP4`."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None where whole rows or tensors do."""

    @property
    def summary(self) -> str:
        """What the 16-bit model is, with its condition, as one phrase."""
        return f"dequantized from {self.name} and rounded to bfloat16"


def source_format(config: Mapping[str, Any]) -> SourceFormat | None:
    """Return how the weights are stored by a `config.json`; None for plain ones, and for what is not read."""
    given = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    if not isinstance(given, Mapping):
        return None
    method = given.get("quant_method")
    if method == "mxfp4":
        return SourceFormat("MXFP4")
    if method in ("fp8", "fbgemm_fp8"):
        return SourceFormat("FP8", _block(given.get("weight_block_size")))
    if method == "compressed-tensors":
        return _compressed_tensors(given)
    return None


def quantization_of(config: Mapping[str, Any]) -> str:
    """Return the name of the quantization that a config announces; empty for a plain model."""
    given = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    return str(given.get("quant_method") if isinstance(given, Mapping) else given or "")


def read_as(shapes: TensorShapes, form: SourceFormat | None) -> TensorShapes:
    """Return the tensors of a checkpoint as they are read: weights under their own names in bfloat16, no scales.

    What has no scale stays as it is.
    """
    result: TensorShapes = {}
    for name, (dtype, shape) in shapes.items():
        if form is None:
            result[name] = dtype, shape
        elif dtype in FLOAT8 and scale_of(name, shapes) is not None:
            result[name] = "BF16", shape
        elif form.name == "MXFP4" and is_packed(name, shapes):
            result[name.removesuffix(BLOCKS)] = "BF16", unpacked_shape(shape)
        elif not _is_scale(name, shapes, form):
            result[name] = dtype, shape
    return result


def scale_of(name: str, names: Mapping[str, Any]) -> str | None:
    """Return the name of an FP8 weight's scale; None where there is none."""
    return next((name + suffix for suffix in SCALES if name + suffix in names), None)


def is_packed(name: str, shapes: TensorShapes) -> bool:
    """Return whether a tensor holds the MXFP4 numbers of a weight: bytes in groups of 16, with their scales."""
    dtype, shape = shapes[name]
    scales = shapes.get(name.removesuffix(BLOCKS) + BLOCK_SCALES)
    packed = name.endswith(BLOCKS) and dtype == "U8" and len(shape) == 4 and shape[-1] == _BYTES
    return packed and scales is not None and scales[1] == shape[:-1]


def unpacked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape `[experts, columns, rows]` of what bytes `[experts, rows, groups, 16]` hold."""
    experts, rows, groups, _ = shape
    return experts, groups * _MXFP4_VALUES, rows


def _is_scale(name: str, shapes: TensorShapes, form: SourceFormat) -> bool:
    if form.name == "MXFP4":
        blocks = name.removesuffix(BLOCK_SCALES) + BLOCKS
        return name.endswith(BLOCK_SCALES) and blocks in shapes and is_packed(blocks, shapes)
    weights = [name.removesuffix(suffix) for suffix in SCALES if name.endswith(suffix)]
    own = any(shapes.get(weight, ("",))[0] in FLOAT8 for weight in weights)
    return own or name.endswith(_SERVING_SCALES)


def _compressed_tensors(given: Mapping[str, Any]) -> SourceFormat | None:
    """Return FP8 where every group has weights of 8-bit floats."""
    groups = given.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if not weights or not all(isinstance(some, Mapping) for some in weights):
        return None
    kinds = {(some.get("type"), some.get("num_bits")) for some in weights}
    blocks = {_block(some.get("block_structure")) for some in weights}
    return SourceFormat("FP8", blocks.pop()) if kinds == {("float", 8)} and len(blocks) == 1 else None


def _block(size: object) -> tuple[int, int] | None:
    if isinstance(size, list) and len(size) == 2 and all(type(some) is int and some > 0 for some in size):
        return size[0], size[1]
    return None
