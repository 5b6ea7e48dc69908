"""Experts in the files of a quantized checkpoint: under which names, and how those of a 16-bit layer are held.

Quantized experts lie there one by one. Where a checkpoint is quantized, Transformers reads those of a layer in 16 bit
stacked only, as it holds them itself: one by one, it leaves them random and says so in its log alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from quant_fairness_plugin.model.architectures.experts import Mixture, find_mixture

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quant_fairness_plugin.model.experts import Experts


def mixture_of(model: nn.Module) -> Mixture | None:
    """Return how the files of a model hold its experts; None where it has none."""
    return find_mixture(str(getattr(getattr(model, "config", None), "model_type", "")))


def stored_module(model: nn.Module, name: str) -> str:
    """Return what files call a linear module of a block."""
    mixture = mixture_of(model)
    return name if mixture is None else mixture.stored_name(name)


def loaded_module(model: nn.Module, name: str) -> str:
    """Return what a model calls a linear module of a block in its files."""
    mixture = mixture_of(model)
    return name if mixture is None else mixture.loaded_name(name)


def kept_experts(model: nn.Module, quantized: Collection[str]) -> dict[str, Experts]:
    """Return the experts of the layers that hold them in 16 bit, by full name; none where nothing is quantized.

    Args:
        model: its experts unfolded, on any device.
        quantized: full names of the modules that the files hold quantized.
    """
    from quant_fairness_plugin.model.experts import expert_modules  # torch, which plan-time code does without

    if not quantized:
        return {}
    busy = {name.rpartition(".")[0].rpartition(".")[0] for name in quantized}
    return {name: experts for name, experts in expert_modules(model) if name not in busy}


def with_stacks(model: nn.Module, state: dict[str, Tensor], quantized: Collection[str]) -> dict[str, Tensor]:
    """Return a model's tensors as files hold them: those of experts in 16 bit stacked, on the meta device.

    Args:
        model: its experts unfolded.
        state: its tensors that are not quantized, by name.
        quantized: full names of the quantized modules.
    """
    import torch  # which plan-time code does without

    from quant_fairness_plugin.model.experts import stacked_shapes

    kept = kept_experts(model, quantized)
    stacks = {
        f"{name}.{part}": torch.empty(shape, device="meta", dtype=next(experts.parameters()).dtype)
        for name, experts in kept.items()
        for part, shape in stacked_shapes(experts).items()
    }
    return {name: tensor for name, tensor in state.items() if owner_of(name, kept) is None} | stacks


def owner_of(name: str, kept: Collection[str]) -> str | None:
    """Return which experts a tensor belongs to; None where to none of these."""
    owner = name.partition(".experts.")[0] + ".experts"
    return owner if owner in kept else None


def stacked_tensors(name: str, experts: Experts, stored: Callable[[str], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return how to make the stacked tensors of a layer's experts, by full name.

    Args:
        name: of the experts in the model.
        experts: them.
        stored: parameter by full name → its value as it is stored.
    """
    from quant_fairness_plugin.model.experts import stacked  # torch, as above

    made = stacked(experts, lambda own: stored(f"{name}.{own}"))
    return {f"{name}.{part}": make for part, make in made.items()}


def skipped_patterns(model: nn.Module, quantized: Collection[str]) -> tuple[str, ...]:
    """Return regular expressions for what readers have to leave in 16 bit: routers, and the experts of some layers.

    They match the names of Transformers and those of servers, which look at experts by names that no file need have.
    """
    mixture = mixture_of(model)
    if mixture is None:
        return ()
    kept = kept_experts(model, quantized)
    return (r"re:.*\.gate$", *(f"re:{pattern}" for pattern in _expert_patterns(kept, mixture)))


def expert_target(model: nn.Module, quantized: Collection[str]) -> str | None:
    """Return the regular expression for all routed experts; None where none are quantized."""
    has_experts = mixture_of(model) is not None and any(".experts." in name for name in quantized)
    return r"re:.*\.experts\.\d+\..*" if has_experts else None


def _expert_patterns(kept: Collection[str], mixture: Mixture) -> Iterator[str]:
    for name in kept:
        before, place, last = name.rsplit(".", 2)
        places = dict.fromkeys((place, mixture.stored_name(name).split(".")[-2]))
        either = place if len(places) == 1 else f"({'|'.join(places)})"
        yield rf"{re.escape(before)}\.{either}\.{last}\..*"
