"""The seeds' simulation of low precision, bit for bit, and a way back.

`simulate(model, rule)` is all of it: one scale per whole tensor, scale = max|W| / (2^(bits-1) - 1), round half to even,
clamp, in place; the rule says by a parameter's name how many bits it gets, or None. `simulate_int4` is that with the
seeds' own rules, which go by substrings of the names. Three variants are in use:

- `Q1` (`protect_layers=`): every name with `weight`, but for names with `ln_f` and those with `h.<i>.` or `layers.<i>.`
  of a protected layer.
- `Q2` (`exclude=`): the same, but every name with `ln` or `norm` is left alone, and a layer is matched by one
  pattern: `model.layers.` or `h.`, whichever a name shows first, else `layers.`.
- `Q3`: like `Q1`, but the final norm is taken too. The seeds' published GPT-2 and OPT figures come from it.

The quirks stay because the figures depend on them: embeddings (so a tied head, too) and, in `Q1` and `Q3`, norm
gains are quantized; biases never are, whatever `protect_biases` says; and in GPT-NeoX, `dense_h_to_4h.` passes for the
pattern `h.`, so that `exclude=` protects nothing there. New work should use `quantize_model`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant_fairness_plugin.errors import ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.model.families import detect_family

_logger = logging.getLogger(__name__)

Variant = Literal["Q1", "Q2", "Q3"]
Rule = Callable[[str], int | None]
"""Name of a parameter → the bits that it gets; None leaves it alone."""
_ATTRIBUTE = "_quant_fairness_simulation"


@dataclass(slots=True)
class _Simulation:
    """What a model carries with it: the way back, and the layers that `protect_layers` registered."""

    originals: dict[str, Tensor] = field(default_factory=dict)
    """Name → weight before the first simulation, on the CPU; only those that were changed."""
    registered: frozenset[int] = frozenset()


def simulate(model: PreTrainedModel, rule: Rule, *, keep_largest: float = 0.0) -> None:
    """Round a model's parameters in place, each by the bits that a rule gives its name; `undo_simulation` undoes it.

    Args:
        model: a causal language model. Carries its original weights afterwards, on the CPU.
        rule: name → bits from 2 to 8, or None.
        keep_largest: share of the weights that stay as they are in spite of the rule: the largest of all that it takes
            together. What a tensor's scale is does not change by that.

    Raises:
        ConfigError: bits that are not a whole number from 2 to 8, or a share that is not from 0 to 1.
    """
    if not 0 <= keep_largest <= 1:
        raise ConfigError(f"keep_largest {keep_largest!r} is no share; use a number from 0 to 1")
    widths = {name: bits for name, _ in model.named_parameters() if (bits := rule(name)) is not None}
    for bits in set(widths.values()):
        _check_bits(bits, None)
    limit = _limit([model.get_parameter(name) for name in widths], keep_largest)
    originals = _state(model).originals
    for name, bits in widths.items():
        parameter = model.get_parameter(name)
        originals.setdefault(name, parameter.detach().to("cpu", copy=True))
        _round_in_place(parameter, bits, limit)


def simulate_int4(
    model: PreTrainedModel,
    protect_layers: Collection[int] | None = None,
    *,
    exclude: Collection[int] | None = None,
    variant: Variant | None = None,
    bits: int | None = None,
    protect_biases: bool = True,
    protect_final_ln: bool | None = None,
    quantize_rest_to: str | None = None,
) -> None:
    """Round a model's weights in place, as the seeds do; `undo_simulation` takes it back.

    Args:
        model: a causal language model. Carries its original weights afterwards, on the CPU.
        protect_layers: layers left alone by the rules of `Q1` (or of `Q3`, if that is the variant).
        exclude: layers left alone by the rules of `Q2`. Not together with `protect_layers`.
        variant: `Q1`, `Q2` or `Q3`; None means `Q2` with `exclude`, else `Q1`.
        bits: 2 to 8; None is what `quantize_rest_to` says, else 4.
        protect_biases: there for the seeds' calls; False only takes names with both `bias` and `weight`, of which the
            supported architectures have none, and logs a warning.
        protect_final_ln: None for the variant's own rule; True leaves the final norm alone in every family (the seeds'
            rule only knows GPT-2's and BLOOM's `ln_f`), False takes it.
        quantize_rest_to: the width by its name, `INT2` to `INT8`, as the seeds' documents write it.

    Raises:
        ConfigError: both lists, a variant that does not go with the list, bits that are not a whole number from 2 to 8
            or not those of `quantize_rest_to`, or `protect_final_ln=False` with `Q2`, which leaves all norms alone.
        InvalidLayerError: a layer that the model lacks.
        UnsupportedModelError: `protect_final_ln=True` on an architecture whose final norm is not known.
    """
    variant = _check_variant(variant, protect_layers, exclude)
    bits = _check_bits(bits, quantize_rest_to)
    if variant == "Q2" and protect_final_ln is False:
        raise ConfigError(
            "protect_final_ln=False has no effect with exclude=, which leaves all norms alone; leave it out"
        )
    if not protect_biases:
        _logger.warning("protect_biases=False changes nothing: the seeds' simulation takes no parameter that is a bias")
    layers = _check_layers(model, protect_layers or exclude or ()) | _state(model).registered
    final_norm = _final_norm(model) if protect_final_ln else None
    marks = _layer_marks(list(model.state_dict()), variant, layers)

    def rule(name: str) -> int | None:
        if not takes(name, variant, biases=not protect_biases, final_norm=protect_final_ln is False):
            return None
        if any(mark in name for mark in marks):
            return None
        if protect_final_ln and ("ln_f" in name or name.startswith(f"{final_norm}.")):
            return None
        return bits

    simulate(model, rule)


def protect_layers(model: PreTrainedModel, layers: Collection[int]) -> tuple[int, ...]:
    """Register layers that every later `simulate_int4` of this model leaves alone; replaces an earlier registration.

    Returns:
        The layers, ascending.

    Raises:
        InvalidLayerError: a layer that the model lacks.
    """
    _state(model).registered = _check_layers(model, layers)
    return tuple(sorted(_state(model).registered))


def is_simulated(model: nn.Module) -> bool:
    """Whether the model carries original weights to go back to."""
    return bool(getattr(model, _ATTRIBUTE, _Simulation()).originals)


def undo_simulation(model: PreTrainedModel) -> None:
    """Give a model the weights that it had before its first simulation, bit for bit, and forget them.

    Raises:
        ConfigError: the model carries no original weights.
    """
    with torch.no_grad():
        for name, original in _originals(model).items():
            model.get_parameter(name).copy_(original)
    _state(model).originals = {}


@contextmanager
def original_weights(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Give back, inside a `with` block, the weights that the model had before its first simulation.

    Raises:
        ConfigError: the model carries no original weights.
    """
    parameters = {name: model.get_parameter(name) for name in _originals(model)}
    simulated = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, original in _originals(model).items():
            parameters[name].data = original.to(parameters[name])  # a copy of the model may be in float32
        yield model
    finally:
        for name, weight in simulated.items():
            parameters[name].data = weight


def _check_variant(
    variant: Variant | None, protected: Collection[int] | None, excluded: Collection[int] | None
) -> Variant:
    if protected is not None and excluded is not None:
        raise ConfigError("protect_layers and exclude cannot be used together; give one of them")
    if variant is None:
        return "Q1" if excluded is None else "Q2"
    if variant not in {"Q1", "Q2", "Q3"}:
        raise ConfigError(f"variant {variant!r} cannot be used; use 'Q1', 'Q2' or 'Q3'")
    if (protected if variant == "Q2" else excluded) is not None:
        wrong, right = ("protect_layers", "exclude") if variant == "Q2" else ("exclude", "protect_layers")
        raise ConfigError(f"{wrong} does not go with variant {variant}; name the layers in {right}")
    return variant


def _check_bits(bits: int | None, quantize_rest_to: str | None) -> int:
    if quantize_rest_to is not None:
        name = re.fullmatch(r"INT([2-8])", str(quantize_rest_to).upper(), re.ASCII)
        if name is None:
            raise ConfigError(
                f"quantize_rest_to {quantize_rest_to!r} cannot be simulated: the seeds' grid is that of whole numbers. "
                "INT2 to INT8 are accepted; use 'INT4'"
            )
        if bits not in (None, int(name[1])):
            raise ConfigError(f"bits {bits!r} contradicts quantize_rest_to {quantize_rest_to!r}; give one of the two")
        return int(name[1])
    if bits is None:
        return 4
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ConfigError(f"bits {bits!r} cannot be used; use a whole number from 2 to 8")
    return bits


def _final_norm(model: PreTrainedModel) -> str:
    family = detect_family(model)
    if family.final_norm is None:
        raise UnsupportedModelError(
            f"protect_final_ln=True: the final norm of this {family.name} architecture is not known. Leave it out"
        )
    return family.final_norm


def _check_layers(model: PreTrainedModel, layers: Collection[int]) -> frozenset[int]:
    count = int(model.config.num_hidden_layers)
    if wrong := [layer for layer in layers if isinstance(layer, (bool, str)) or layer not in range(count)]:
        raise InvalidLayerError(f"layer {wrong[0]!r} does not exist; the model has layers 0 to {count - 1}")
    return frozenset(int(layer) for layer in layers)


def _layer_marks(names: list[str], variant: Variant, layers: frozenset[int]) -> tuple[str, ...]:
    """The substrings that mark a name as belonging to a protected layer."""
    patterns: tuple[str, ...] = ("h.", "layers.")
    if variant == "Q2":
        shown = ("model.layers." if "model.layers." in name else "h." for name in names if _shows_layers(name))
        patterns = (next(shown, "layers."),)
    return tuple(f"{pattern}{layer}." for pattern in patterns for layer in sorted(layers))


def _shows_layers(name: str) -> bool:
    return "model.layers." in name or "h." in name


def takes(name: str, variant: Variant, *, biases: bool = False, final_norm: bool = False) -> bool:
    """Whether a variant quantizes a parameter of this name, layers aside."""
    if "weight" not in name:
        return False
    if variant == "Q3":
        return True
    if "bias" in name and not biases:
        return False
    if variant == "Q2":
        return "ln" not in name.lower() and "norm" not in name.lower()
    return final_norm or "ln_f" not in name


@torch.no_grad()
def _round_in_place(parameter: nn.Parameter, bits: int, limit: float) -> None:
    largest = 2 ** (bits - 1) - 1
    peak = parameter.abs().max()
    if peak > 0:  # all zeros, or NaN: stays as it is
        scale = peak / largest
        rounded = torch.round(parameter / scale).clamp_(-largest - 1, largest) * scale
        parameter.copy_(rounded if math.isinf(limit) else torch.where(parameter.abs() >= limit, parameter, rounded))


@torch.no_grad()
def _limit(parameters: list[nn.Parameter], share: float) -> float:
    """Return the magnitude from which on so large a share of all these weights lies."""
    count = round(share * sum(parameter.numel() for parameter in parameters))
    if not count:
        return math.inf
    sizes = torch.cat([parameter.abs().flatten() for parameter in parameters])
    return float(sizes.topk(count, sorted=False).values.min())


def _state(model: PreTrainedModel) -> _Simulation:
    if not isinstance(getattr(model, _ATTRIBUTE, None), _Simulation):
        setattr(model, _ATTRIBUTE, _Simulation())
    state = getattr(model, _ATTRIBUTE)
    assert isinstance(state, _Simulation)
    return state


def _originals(model: PreTrainedModel) -> dict[str, Tensor]:
    if not is_simulated(model):
        raise ConfigError("the model carries no original weights to go back to; call simulate_int4 on it first")
    return _state(model).originals
