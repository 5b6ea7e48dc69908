"""Layouts that we never write read back as what their own library, or a loop over single numbers, makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from quant_fairness_plugin.checkpoint.dense_modules import dense_weight, tensor_layout
from quant_fairness_plugin.errors import ArtifactError, UnsupportedModelError

ROWS, COLS = 48, 256
INT, FLOAT = {"type": "int"}, {"type": "float"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "INT8, channel": ("int-quantized", INT | {"num_bits": 8, "strategy": "channel"}),
    "INT8, tensor": ("int-quantized", INT | {"num_bits": 8, "strategy": "tensor"}),
    "INT8, group, asymmetric": (
        "int-quantized",
        INT | {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "INT4, channel": ("pack-quantized", INT | {"num_bits": 4, "strategy": "channel"}),
    "INT4, group": ("pack-quantized", INT | {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "INT4, group, asymmetric": (
        "pack-quantized",
        INT | {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "INT8, packed": ("pack-quantized", INT | {"num_bits": 8, "strategy": "group", "group_size": 128}),
    "FP8, channel": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "channel"}),
    "FP8, tensor": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "tensor"}),
    "FP8, block": ("float-quantized", FLOAT | {"num_bits": 8, "strategy": "block", "block_structure": [16, 128]}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        FLOAT | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "MXFP4": ("mxfp4-pack-quantized", FLOAT | MX | {"num_bits": 4}),
    "MXFP8": ("mxfp8-quantized", FLOAT | MX | {"num_bits": 8}),
}


def by_scale(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The weight with the numbers that share a scale in its last dimension."""
    match str(args.strategy.value if hasattr(args.strategy, "value") else args.strategy):
        case "tensor":
            return weight.reshape(1, -1)
        case "channel":
            return weight.reshape(ROWS, 1, COLS)
        case "block":
            down, across = args.block_structure
            tiles = weight.reshape(ROWS // down, down, COLS // across, across).transpose(1, 2)
            return tiles.reshape(ROWS // down, COLS // across, down * across)
        case _:
            return weight.reshape(ROWS, COLS // args.group_size, args.group_size)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_as_its_own_library_reads_it(name: str) -> None:
    form, settings = SCHEMES[name]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    low, high = by_scale(weight, args).aminmax(dim=-1)
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scales, zeros = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scales} | ({} if args.symmetric else {"weight_zero_point": zeros})
    library = BaseCompressor.get_value_from_registry(form)
    stored = {key: torch.as_tensor(value).detach() for key, value in library.compress(state, scheme).items()}
    expected = library.decompress(stored, scheme)["weight"]
    assert tensor_layout({"quant_method": "compressed-tensors", "format": form}) == "compressed-tensors"
    read = dense_weight("m", stored, "compressed-tensors")
    rounding = 2**-8 if expected.dtype == torch.bfloat16 else 1e-6  # the library's FP4 come out in bfloat16
    torch.testing.assert_close(read, expected.float(), rtol=rounding, atol=0)
    assert 0 < (read - weight).norm() / weight.norm() < 0.2


def test_fp8_in_blocks_of_which_the_last_is_cut() -> None:
    rows, cols = 130, 256
    values = torch.randn(rows, cols).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2) + 0.5
    expected = torch.empty(rows, cols)
    for n in range(rows):
        for k in range(cols):
            expected[n, k] = float(values[n, k]) * float(scales[n // 128, k // 128])
    assert tensor_layout({"quant_method": "fp8"}) == "fp8"
    assert torch.equal(dense_weight("m", {"weight": values, "weight_scale_inv": scales}, "fp8"), expected)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double quantized"])
def test_bitsandbytes_of_four_bits(nested: bool) -> None:
    rows, cols, block = 6, 96, 64
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows * cols,), generator=draw)
    table, largest = torch.linspace(-1, 1, 16), torch.rand(rows * cols // block, generator=draw) + 0.1
    state: dict[str, Any] = {"blocksize": block, "shape": [rows, cols], "quant_type": "nf4"}
    parts = {
        "weight": torch.tensor([[int(a) * 16 + int(b)] for a, b in codes.reshape(-1, 2)], dtype=torch.uint8),
        "weight.absmax": largest,
        "weight.quant_map": table,
    }
    if nested:
        second = torch.linspace(-1, 1, 256)
        parts |= {
            "weight.absmax": torch.randint(0, 256, (len(largest),), generator=draw).to(torch.uint8),
            "weight.nested_absmax": torch.rand(3, generator=draw), "weight.nested_quant_map": second,
        }  # fmt: skip
        state |= {"nested_blocksize": 4, "nested_offset": 0.25}
        coarse = [float(parts["weight.nested_absmax"][i // 4]) for i in range(len(largest))]
        listed = zip(parts["weight.absmax"].tolist(), coarse, strict=True)
        largest = torch.tensor([float(second[code]) * scale + 0.25 for code, scale in listed])
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    expected = torch.tensor([float(table[code]) * float(largest[i // block]) for i, code in enumerate(codes)])
    read = dense_weight("m", parts, "bitsandbytes")
    torch.testing.assert_close(read, expected.reshape(rows, cols), rtol=1e-6, atol=0)


def test_bitsandbytes_of_eight_bits() -> None:
    integers, scales = torch.randint(-127, 128, (5, 7)).to(torch.int8), torch.rand(5)
    expected = torch.tensor([[float(q) * float(s) / 127 for q in row] for row, s in zip(integers, scales, strict=True)])
    torch.testing.assert_close(dense_weight("m", {"weight": integers, "SCB": scales}, "bitsandbytes"), expected)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' cannot be dequantized here; allowed: pack-quantized"),
        ({"config_groups": {"a": {"format": "sparse-bitmask"}}}, "format 'sparse-bitmask'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
        ({"config_groups": {"a": {"weights": {"num_bits": 7, "type": "int"}}}}, "of 7 bits"),
        ({"transform_config": {"config_groups": {"r": {}}}}, "transform_config"),
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits cannot be dequantized here; allowed: 4 and 8"),
        ({"quant_method": "modelopt"}, "'modelopt' cannot be dequantized here; allowed: compressed-tensors, gptq"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tensor_layout({"quant_method": "compressed-tensors"} | metadata)


def test_scales_that_fit_no_blocks_are_an_artifact_error() -> None:
    parts = {"weight": torch.zeros(130, 8).to(torch.int8), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(ArtifactError, match="4 scales for 130 numbers"):
        dense_weight("m", parts, "compressed-tensors")
