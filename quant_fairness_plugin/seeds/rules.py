"""The seeds' experiments as one-line rules: what is rounded, and what is left alone or gets 8 bits.

    Q3                  every name with `weight`, INT4; Q1, Q2 as in `simulation`; Q4 is Q3 with the biases
    Q3 int3: 0 11       layers 0 and 11 left alone, the rest at 3 bits
    Q1: 0@8 9@8 11@8    three layers at 8 bits, the rest at 4
    Q3: 0.mlp tokens    a layer's MLP and the token embeddings left alone

Layers are numbered as in GPT-2, whose twelve the seeds went by; in a model of another depth a number means the layer at
the same relative depth. Beside them: `attention`, `mlp`, `norms`, `biases`, `tokens`, `positions`, `odd`, `even`;
`largest=5%` of the single weights; whole tensors at `random=11.4%/42` (share and seed) or by `magnitude=11.4%`;
`variance=2`, the layers of the largest variance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.families import Family, detect_family
from quant_fairness_plugin.seeds.simulation import Rule, Variant, takes

GPT2_LAYERS = 12
Matches = Callable[[str], bool]
_RULE = re.compile(r"(Q[1-4])(?: int([2-8]))?(?:: (\S+(?: \S+)*))?")
_ITEM = re.compile(r"(\d+|[a-z]+)(?:\.(attention|mlp))?(?:=([\d.]+)(%)?(?:/(\d+))?)?(?:@([2-8]))?")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `simulate` takes."""

    rule: Rule
    keep_largest: float = 0.0


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    part: str | None
    value: float
    seed: int
    bits: int | None


def read_rule(text: str, model: PreTrainedModel) -> Recipe:
    """Return what a rule says about a model.

    Raises:
        ConfigError: text that is no rule.
        UnsupportedModelError: an architecture whose parts are not known.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no rule; write 'Q3', 'Q3 int3: 0 11' or 'Q1: 0@8 9@8 mlp'")
    variant, rest, family = match[1], int(match[2] or 4), detect_family(model)
    items = [_read_item(item) for item in (match[3] or "").split()]
    single = next((item.value for item in items if item.name == "largest"), 0.0)
    chosen = [(_matcher(item, family, model), item.bits) for item in items if item.name != "largest"]

    def rule(name: str) -> int | None:
        for matches, bits in chosen:
            if matches(name):
                return bits
        return rest if _taken(name, variant) else None

    return Recipe(rule, single)


def scaled_layer(layer: int, layers: int) -> int:
    """Return the layer at the relative depth that a layer of GPT-2 has.

    >>> [scaled_layer(layer, 30) for layer in (0, 9, 11)], scaled_layer(9, 12)
    ([0, 24, 29], 9)
    """
    return round(layer * (layers - 1) / (GPT2_LAYERS - 1))


def _taken(name: str, variant: str) -> bool:
    if variant == "Q4":
        return True
    base: dict[str, Variant] = {"Q1": "Q1", "Q2": "Q2", "Q3": "Q3"}
    return takes(name, base[variant])


def _read_item(text: str) -> _Item:
    match = _ITEM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} names no part of a model; write 0, 0.mlp, 9@8, attention, largest=5% or the like")
    value = float(match[3] or 0) / (100 if match[4] else 1)
    return _Item(match[1], match[2], value, int(match[5] or 0), None if match[6] is None else int(match[6]))


def _matcher(item: _Item, family: Family, model: PreTrainedModel) -> Matches:
    layers = int(model.config.get_text_config().num_hidden_layers)
    if item.name.isdecimal():
        if int(item.name) >= GPT2_LAYERS:
            raise ConfigError(f"layer {item.name}: rules number the layers of GPT-2, 0 to {GPT2_LAYERS - 1}")
        prefix = f"{family.blocks}.{scaled_layer(int(item.name), layers)}."
        part = (lambda name: True) if item.part is None else _part(item.part, family)
        return lambda name: name.startswith(prefix) and part(name)
    if item.name in {"odd", "even"}:
        prefixes = tuple(f"{family.blocks}.{layer}." for layer in range(item.name == "odd", layers, 2))
        return lambda name: name.startswith(prefixes)
    if item.name in _TENSORS:
        names = frozenset(_TENSORS[item.name](item, family, model))
        return lambda name: name in names
    return _part(item.name, family)


def _part(name: str, family: Family) -> Matches:
    inside = f"{family.blocks}."
    embeddings = [f"{module}.weight" for module in family.embeddings]
    parts: dict[str, Matches] = {
        "attention": lambda name: name.startswith(inside) and _is_attention(name),
        "mlp": lambda name: name.startswith(inside) and not _is_attention(name) and not _is_norm(name),
        "norms": _is_norm,
        "biases": lambda name: name.endswith(".bias"),
        "tokens": lambda name: name in embeddings[:1],
        "positions": lambda name: name in embeddings[1:],
    }
    if name not in parts:
        named = ", ".join((*parts, "odd", "even", "largest", *_TENSORS))
        raise ConfigError(f"{name!r} names no part of a model; use a layer, or one of {named}")
    return parts[name]


def _is_attention(name: str) -> bool:
    return "attn" in name and not _is_norm(name)


def _is_norm(name: str) -> bool:
    module = name.rpartition(".")[0].rpartition(".")[2].lower()
    return "ln" in module or "norm" in module


def _random(item: _Item, family: Family, model: PreTrainedModel) -> Iterator[str]:
    """Draw as experiment 055 does: tensor after tensor, with the share as probability, until two layers' worth."""
    draw = random.Random(item.seed)
    two_layers = 2 * sum(p.numel() for name, p in model.named_parameters() if name.startswith(f"{family.blocks}.0."))
    kept = 0
    for name, parameter in _weights(model):
        if kept < two_layers and draw.random() < item.value:
            kept += parameter.numel()
            yield name


def _magnitude(item: _Item, family: Family, model: PreTrainedModel) -> Iterator[str]:
    """Take the tensors of the largest mean magnitude until they pass the share, as experiment 056 does."""
    total, kept = sum(parameter.numel() for parameter in model.parameters()), 0
    for name, parameter in sorted(_weights(model), key=lambda pair: -float(pair[1].detach().abs().mean())):
        if kept / total >= item.value:
            return
        kept += parameter.numel()
        yield name


def _variance(item: _Item, family: Family, model: PreTrainedModel) -> Iterator[str]:
    """Take the layers whose weights, all tensors pooled, vary most."""
    layers = range(int(model.config.get_text_config().num_hidden_layers))
    members = {
        layer: [pair for pair in _weights(model) if pair[0].startswith(f"{family.blocks}.{layer}.")] for layer in layers
    }
    variances = {
        layer: float(torch.cat([parameter.detach().float().flatten() for _, parameter in pairs]).var())
        for layer, pairs in members.items()
    }
    for layer in sorted(layers, key=lambda layer: -variances[layer])[: int(item.value)]:
        yield from (name for name, _ in members[layer])


def _weights(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if "weight" in name]


_TENSORS: dict[str, Callable[[_Item, Family, PreTrainedModel], Iterator[str]]] = {
    "random": _random,
    "magnitude": _magnitude,
    "variance": _variance,
}
