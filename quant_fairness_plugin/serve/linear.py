"""The linear module that computes with a 4-bit weight, and its way into a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from quant_fairness_kernels.cpu_matmul import CpuWeight, cpu_matmul, prepare_cpu
from quant_fairness_kernels.int4_matmul import Columns, int4_matmul
from quant_fairness_kernels.nibble_planes import NibblePlanes
from torch import Tensor, nn

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.linear import is_conv1d, is_linear, linear_weight


@dataclass(frozen=True, slots=True)
class _PlaneSizes:
    """What of `NibblePlanes` is no tensor; its tensors are buffers of the module, so that they move with it."""

    N: int
    K: int
    groups: int
    symmetric: bool
    dtype: torch.dtype


class QuantizedLinear(nn.Module):
    """`x @ W^T + bias` with a 4-bit W `[out_features, in_features]`, by the Triton kernels or by the CPU path.

    On a GPU 0.5 byte per weight. On a CPU 2, or 4 in float32, because the dequantized weight stays for prompts; where
    torch's 4-bit operator is faster for few tokens (bfloat16, measured shapes) 2.5, since both forms stay. So a CPU
    model needs up to 1.25 times the memory of its 16-bit original: the CPU path is for speed and for the same results
    as elsewhere, not for memory.

    Has no `weight`, and takes no gradients. It cannot be saved: what it was loaded from is the checkpoint.
    """

    words: Tensor
    scales: Tensor
    permutation: Tensor | None
    counters: Tensor
    column_index: Tensor | None
    column_weights: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        planes: NibblePlanes,
        *,
        bias: Tensor | None,
        dtype: torch.dtype,
        on_cpu: bool,
        columns: Columns | None = None,
    ) -> None:
        """Prepare one module.

        Args:
            planes: the weight, on the CPU; with `on_cpu=False` its type must be `dtype`.
            bias: `[out_features]`, or None.
            dtype: of the activations.
            on_cpu: the CPU path, else the Triton kernels once the module has been moved to a GPU.
            columns: input channels that keep 16 bit, as what is added to the weight there; in the same launch.
        """
        super().__init__()
        self.in_features, self.out_features = planes.K, planes.N
        self.dtype = dtype
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self._cpu: CpuWeight | None = prepare_cpu(planes, dtype=dtype, columns=columns) if on_cpu else None
        self._sizes = _PlaneSizes(planes.N, planes.K, planes.groups, planes.symmetric, planes.dtype)
        for name in ("words", "scales", "permutation", "counters"):
            self.register_buffer(name, None if on_cpu else getattr(planes, name), persistent=False)
        checked = None if on_cpu or columns is None else columns.checked(N=planes.N, K=planes.K)
        self.register_buffer("column_index", None if checked is None else checked.index, persistent=False)
        self.register_buffer("column_weights", None if checked is None else checked.weights.to(dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, both in `dtype`.

        Raises:
            ValueError: activations of another type, size or device than the module was prepared for.
        """
        if self._cpu is not None:
            return cpu_matmul(x, self._cpu, bias=self.bias)
        rows = x if x.stride(-1) == 1 else x.contiguous()
        columns = None
        if self.column_index is not None and self.column_weights is not None:
            columns = Columns(self.column_index, self.column_weights)
        return int4_matmul(rows, self._planes(), columns=columns, bias=self.bias, kernel="triton")

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        path = "cpu" if self._cpu is not None else "triton"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kernel={path}"

    def _planes(self) -> NibblePlanes:
        sizes = self._sizes
        return NibblePlanes(
            words=self.words,
            scales=self.scales,
            permutation=self.permutation,
            counters=self.counters,
            N=sizes.N,
            K=sizes.K,
            groups=sizes.groups,
            symmetric=sizes.symmetric,
            dtype=sizes.dtype,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        """Refuse: a file without these weights would load, with random ones in their place."""
        raise UnsupportedModelError(
            f"{prefix.rstrip('.')} holds a 4-bit weight in a kernel's layout, which no checkpoint format has. Copy the "
            "folder that the model was loaded from instead of saving it."
        )


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module of that full name, in evaluation mode."""
    parent, _, child = name.rpartition(".")
    module.train(False)
    setattr(model.get_submodule(parent), child, module)


def put_dense(model: nn.Module, name: str, weight: Tensor, *, dtype: torch.dtype) -> None:
    """Give an `nn.Linear` or `Conv1D` a new weight parameter `[rows, cols]`, rounded to `dtype`."""
    module = model.get_submodule(name)
    stored = weight.t() if is_conv1d(module) else weight
    module.weight = nn.Parameter(stored.to(dtype).contiguous(), requires_grad=False)


def check_protected(model: nn.Module, *, dtype: torch.dtype, replaced: Iterable[str]) -> int:
    """Every linear module that was not quantized must hold a plain weight in the model's type; returns how many do.

    Args:
        model: with its quantized modules replaced.
        dtype: the type that the model computes in.
        replaced: full names of the quantized modules.

    Raises:
        UnsupportedModelError: a module whose weight is packed, on the meta device, or of another type; names it.
    """
    quantized, seen = set(replaced), 0
    for name, module in model.named_modules():
        if name in quantized or not is_linear(module):
            continue
        weight = linear_weight(module) if isinstance(module._parameters.get("weight"), nn.Parameter) else None
        if weight is None or weight.is_meta or type(module.weight) is not nn.Parameter or weight.dtype != dtype:
            held = "no plain weight" if weight is None else f"a weight in {weight.dtype} on {weight.device}"
            raise UnsupportedModelError(
                f"{name} is protected, and holds {held}; expected is a plain one in {dtype}. Load the model with "
                f"dtype={dtype}."
            )
        seen += 1
    return seen
