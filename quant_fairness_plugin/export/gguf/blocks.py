"""One tensor as the bytes of a GGUF type. Layouts are those of ggml (`ggml-common.h`, ggml-org/ggml).

Q4_0, Q5_0 and Q8_0 hold blocks of 32 input channels: a float16 scale, then integers around 0. A symmetric grid of 4, 5
or 8 bits is one of them, value for value; where more channels share a scale, their blocks repeat it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.gguf import BLOCK, TYPES
from quant_fairness_plugin.quantize.grid import QuantizedTensor

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""dtype of a tensor → the type that holds its values."""


def type_of(name: str, bits: int) -> str:
    """Return the type that holds a module of so many bits.

    Raises:
        UnsupportedModelError: none does.
    """
    if bits not in TYPES:
        raise UnsupportedModelError(
            f"{name} has {bits} bits; GGUF files are written with {', '.join(map(str, TYPES))}. Use one of them"
        )
    return TYPES[bits]


def packed_blocks(name: str, tensor: QuantizedTensor) -> np.ndarray[Any, Any]:
    """Return a quantized module as Q4_0, Q5_0 or Q8_0, uint8 `[rows, bytes of a row]`.

    Args:
        name: of the module, for errors.
        tensor: its integers.

    Raises:
        UnsupportedModelError: other widths, an asymmetric grid, groups that are not whole blocks, or scales beyond
            float16.
    """
    kind = type_of(name, tensor.grid.bits)
    rows, cols = tensor.integers.shape
    size, middle = cols // tensor.scales.shape[1], 2 ** (tensor.grid.bits - 1)
    if not bool((tensor.zeros == middle).all()):
        raise UnsupportedModelError(
            f"{name} has zero points other than {middle}; GGUF's {kind} has no others. Quantize with --sym"
        )
    if size % BLOCK:
        raise UnsupportedModelError(
            f"{name} has groups of {size} input channels; GGUF's blocks are of {BLOCK}. Quantize with --group-size "
            f"{BLOCK}, or leave it in 16 bit with --protect-units"
        )
    scales = tensor.scales.to(torch.float16).repeat_interleave(size // BLOCK, dim=1)
    if not bool(scales.isfinite().all()):
        raise UnsupportedModelError(f"{name} has scales above 65504, the largest that GGUF holds")
    blocks = tensor.integers.view(rows, -1, BLOCK)
    low, high = blocks[..., : BLOCK // 2], blocks[..., BLOCK // 2 :]
    parts = [scales.contiguous().numpy().view(np.uint8).reshape(rows, -1, 2)]
    if tensor.grid.bits == 5:  # the fifth bits of a block, in order
        parts.append(np.packbits((blocks >> 4).numpy(), axis=2, bitorder="little"))
    if tensor.grid.bits == 8:
        parts.append((blocks.to(torch.int16) - middle).to(torch.int8).numpy().view(np.uint8))
    else:
        parts.append((low & 15 | high << 4).numpy())
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def plain_values(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Return a tensor as a type that gguf converts to: F32, F16, BF16 or Q8_0.

    Args:
        tensor: floating point.
        kind: name of the type.
    """
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    values: np.ndarray[Any, Any] = gguf.quants.quantize(tensor.float().contiguous().numpy(), wanted)
    return values


def dense_values(data: np.ndarray[Any, Any], kind: str) -> Tensor:
    """Return what a tensor of a GGUF file stands for, float32, as the package gguf reads it.

    Raises:
        UnsupportedModelError: a type that the package does not dequantize.
    """
    import gguf

    try:
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as err:
        raise UnsupportedModelError(
            f"the package gguf does not read {kind}; give a GGUF of the same model in F16, BF16 or Q8_0"
        ) from err
    return torch.from_numpy(np.array(values, dtype=np.float32))
