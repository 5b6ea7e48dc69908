"""A device without a device: numbers of this CPU under the label `pretend`, which mixing with other tensors refuses.

Renames torch's spare backend for the whole process, so it is for processes of its own. It shows where tensors are
placed, and nothing of speed or of other roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
MOVES = frozenset({"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense", "aten::item", "aten::set_"})
"""What may take tensors of two devices at once."""


class PretendTensor(Tensor):
    """A tensor that says it is elsewhere, and holds one that is here."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[PretendTensor], held: Tensor) -> PretendTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def data(self) -> PretendTensor:
        """Return the values; assigned to, the tensor holds others, of this device."""
        return PretendTensor(self.held)

    @data.setter
    def data(self, value: PretendTensor) -> None:
        self.held = value.held

    def tolist(self) -> Any:
        """Return plain numbers, as a tensor of a device does."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class PretendMode(TorchDispatchMode):
    """Inside it tensors can be made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the tensors that are held, and say where its result is.

    Raises:
        RuntimeError: its tensors are on two devices. Numbers (no dimension) may be anywhere, and so may an index, as
            on a GPU.
    """
    name = function._schema.name
    tensors = list(tensors_in((*args, *kwargs.values())))
    there = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    if there and name not in MOVES and not name.startswith("aten::index"):
        for tensor in tensors:
            if not isinstance(tensor, PretendTensor) and tensor.dim() > 0:
                raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {DEVICE} and cpu")
    wanted = kwargs.get("device")
    if wanted is not None:
        there = torch.device(wanted).type == NAME
    inner = {key: with_tensors(_held, value) for key, value in kwargs.items() if key != "pin_memory"}
    if there and wanted is not None:
        inner["device"] = torch.device("cpu")
    result = function(*(with_tensors(_held, value) for value in args), **inner)
    if name.endswith("_") and not name.endswith("__"):  # in place; `__and__` is not
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return with_tensors(_placed, result) if there else result


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of arguments, those in lists and tuples, too: torch's own walk of trees is slower."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def with_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a value with each of its tensors changed; lists and tuples stay what they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([with_tensors(change, part) for part in value])
    return value


def _held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, PretendTensor) else value


def _placed(value: Tensor) -> Tensor:
    return value if isinstance(value, PretendTensor) else PretendTensor(value)
