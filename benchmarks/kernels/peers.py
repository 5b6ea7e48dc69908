"""INT4 kernels of other projects, each given our integers and scales through its own packing.

None of them is a dependency: a peer is imported where it is used, and left out where it cannot be imported. Every
function was written from the source of the version that it names. None has been run on a GPU yet; what it computes is
compared with the dequantized weight before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import NamedTuple

import torch
from quant_fairness_kernels.timing import copies_needed
from torch import Tensor

Provider = Callable[[Tensor, Tensor, Tensor], list[Callable[[Tensor], Tensor]]]
"""From integers `[N, K]`, scales `[N, G]` and the dequantized weight, a call per rotated copy; the zero point is 8."""
ZERO = 8


def gemlite(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """`GemLiteLinear.pack` and `forward_functional` of gemlite 0.6.0.post2 (github.com/dropbox/gemlite).

    `pack` takes uint8 integers `[N, K]`, and scales and zero points `[N, G]` for `(integer - zero) * scale`. The zero
    points are a tensor, as in its own benchmark. At the first call with a number of tokens it times configurations,
    unless a table has one: a call must come before any timing. The package has tables by the GPU's name, among them
    the H100's and not the H200's, so the H100's is read on every GPU of that kind.
    """
    module = import_module("gemlite")
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) == (9, 0):
        module.load_config(str(Path(str(module.__file__)).parent / "configs" / "h100.json"))
    (N, K), half = weight.shape, module.DType.FP16
    layer = module.GemLiteLinear(
        4, group_size=K // scales.shape[1], in_features=K, out_features=N, input_dtype=half, output_dtype=half
    )
    on_device = scales.to(weight.device)
    layer.pack(integers.to(weight.device), on_device, torch.full_like(on_device, ZERO), None)
    tensors, meta = layer.get_tensor_args(), layer.get_meta_args()
    copies = [[tensor.detach().clone() for tensor in tensors] for _ in range(copies_needed(weight.numel() // 2))]
    return [partial(module.forward_functional, bias=None, tensor_args=copy, meta_args=meta) for copy in copies]


def humming(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """`HummingLayer` and `humming_forward` of humming-kernels 0.1.19 (github.com/vllm-project/humming).

    `ops.pack_weight` takes int32 integers `[N, K]` on the GPU, and the layer scales `[N, G]`; `uint4` without zero
    points means `(integer - 8) * scale`. Kernels are chosen by its own tables and compiled at the first call with a
    number of tokens, by nvcc or nvrtc. `locks` synchronize the blocks of one call, so every copy has its own.
    """
    layers, forward, ops = (import_module(f"humming.{name}") for name in ("layer", "forward", "ops"))
    N, K = weight.shape
    scheme = {"dtype": "uint4", "group_size": K // scales.shape[1], "scale_dtype": "float16"}
    layer = layers.HummingLayer(shape_n=N, shape_k=K, weight_config=scheme, torch_dtype=torch.float16)
    layer = layer.to(weight.device)
    packed = ops.pack_weight(integers.to(weight.device, torch.int32), 4)
    layer.load_from_tensors({"weight": packed, "weight_scale": scales.to(weight.device)})
    layer.transform()
    tensors = {**dict(layer.named_parameters()), "locks": layer.locks}
    copies = [
        {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for _ in range(copies_needed(weight.numel() // 2))
    ]
    return [partial(forward.humming_forward, layer.humming_config, **copy) for copy in copies]


def marlin(integers: Tensor, scales: Tensor, weight: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """`marlin.Layer` of IST-DASLab's Marlin 0.1.1, commit 2f6d7c1 (github.com/IST-DASLab/marlin).

    `pack` takes a float16 linear layer and scales `[N, G]` and finds the integers again by rounding, which is exact
    here. It takes float16, a zero point of 8, groups of 128 or whole rows, K a multiple of 128 and N of 256, and says
    so otherwise. The package is not on PyPI; it needs `marlin_cuda`, its extension, built by nvcc.
    """
    module = import_module("marlin")
    N, K = weight.shape
    linear = torch.nn.Linear(K, N, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = module.Layer(K, N, groupsize=K // scales.shape[1]).to(weight.device)
    layer.pack(linear, scales.to(weight.device))
    return [layer, *(deepcopy(layer) for _ in range(copies_needed(weight.numel() // 2) - 1))]


class Peer(NamedTuple):
    """What to call, what it imports (the package that knows its version first) and the name that pip knows it by."""

    provider: Provider
    modules: tuple[str, ...]
    distribution: str


PEERS = {
    "gemlite": Peer(gemlite, ("gemlite",), "gemlite"),
    "humming": Peer(humming, ("humming", "humming.layer", "humming.forward", "humming.ops"), "humming-kernels"),
    "marlin": Peer(marlin, ("marlin_cuda", "marlin"), "marlin"),
}


def why_missing(peer: Peer) -> str | None:
    """Why a peer cannot be used here, with the package that is missing; None if it can."""
    for module in peer.modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            return f"there is no package {error.name}"
        except (ImportError, OSError, RuntimeError, AssertionError) as error:  # what these three raise without a GPU
            return f"{module} cannot be imported: {error}"
    return None


def version_of(peer: Peer) -> str | None:
    """The version of an importable peer; None where neither pip nor the package knows it."""
    try:
        return package_version(peer.distribution)
    except PackageNotFoundError:
        version = getattr(import_module(peer.modules[0]), "__version__", None)
        return None if version is None else str(version)
