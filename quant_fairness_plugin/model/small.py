"""Small models of an architecture with random weights: to trace its blocks, and to try an export before the work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quant_fairness_plugin.model.architectures.architecture import LAYER_KEYS
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.quiet import quiet_transformers

DEPTHS = (2, 4)
"""Layers of a small model; four where two cannot be built (a pattern of several kinds)."""
MAX_VALUES = 2_000_000_000
"""Of a small model; one that is larger is not built."""
NARROW_VALUES = 100_000_000
"""Of a narrow model, which is computed in float64 and many times."""
HEAD_WIDTH, RANK, VOCABULARY, POSITIONS = 8, 24, 256, 64
"""Channels of a head, of a low-rank middle, rows of the embedding, and the longest input of a narrow model."""

Config = dict[str, Any]
_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "block_ff_dim")
_HEAD_WIDTHS = (
    "head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
_RANKS = ("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "sliding_window")
_PLAIN_ROTARY = frozenset({"default", "linear"})


def small_model(model: PreTrainedModel, *, least: int = DEPTHS[0]) -> PreTrainedModel | None:
    """Return a model of the same class with few layers and random weights; None where none can be built.

    Its weights are float16 values in float32. The global random numbers stay as they were.

    Args:
        model: whose class and config it is; the meta device will do.
        least: how many layers it must have, to hold every kind of layer.
    """
    whole = model.config.to_dict()
    depths = sorted({max(least, depth) for depth in DEPTHS})
    configs = [shortened(whole, depth) for depth in depths if depth < count_layers(whole)]
    for config in (*configs, None):
        small = build_model(model, config, MAX_VALUES)
        if small is not None:
            for parameter in small.parameters():
                parameter.data = parameter.data.half().float()
            return small
    return None


def narrow_models(
    model: PreTrainedModel, depth: int, accepts: Callable[[PreTrainedModel], bool]
) -> Iterator[PreTrainedModel]:
    """Yield models of the same class that are cheap to run, the cheapest first.

    Args:
        model: whose class and config it is; the meta device will do.
        depth: how many of the first layers show everything that layers are made of.
        accepts: whether a model on the meta device has what is needed.
    """
    whole = model.config.to_dict()
    short = shortened(whole, depth)
    tiny = sum(parameter.numel() for parameter in model.parameters()) <= NARROW_VALUES // 50
    for config in (short, None) if tiny else (narrowed(short), narrowed(whole), short):
        small = build_model(model, config, NARROW_VALUES, accepts)
        if small is not None:
            yield small


def build_model(
    model: PreTrainedModel,
    config: Config | None,
    most: int,
    accepts: Callable[[PreTrainedModel], bool] = lambda outline: True,
) -> PreTrainedModel | None:
    """Return a model of the same class by a config, in evaluation mode; None where it cannot be built.

    Args:
        model: whose class it is.
        config: as a dictionary; None is the model's own.
        most: values that it may hold.
        accepts: whether an empty one, on the meta device, has what is needed.
    """
    try:
        with quiet_transformers(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            made = deepcopy(model.config) if config is None else type(model.config).from_dict(deepcopy(config))
            with torch.device("meta"):
                outline = type(model)(deepcopy(made))
            if sum(parameter.numel() for parameter in outline.parameters()) > most or not accepts(outline):
                return None
            torch.manual_seed(0)
            small: PreTrainedModel = type(model)(made)
    except Exception:  # noqa: BLE001 - configs check themselves in ways of their own; another one may do
        return None
    small.requires_grad_(False)
    small.train(False)
    return small


def count_layers(config: Mapping[str, Any]) -> int:
    """Return the number of layers that a config says, of the text decoder where there are several; 0 if none."""
    if isinstance(config.get("text_config"), dict):
        return count_layers(config["text_config"])
    return next((config[key] for key in LAYER_KEYS if isinstance(config.get(key), int)), 0)


def shortened(config: Mapping[str, Any], depth: int) -> Config:
    """Return a config of the first layers (of its text decoder); lists with an entry per layer are cut too."""
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": shortened(config["text_config"], depth)}
    layers = count_layers(config)
    cut = {
        key: value[:depth] if isinstance(value, list) and len(value) == layers else value
        for key, value in config.items()
    }
    return cut | {key: min(depth, layers) for key in LAYER_KEYS if isinstance(config.get(key), int)}


def narrowed(config: Mapping[str, Any]) -> Config:
    """Return a config of narrow layers: as many heads as before, of few channels each.

    What else is as wide as the hidden state stays as wide; where a config asks for more than that, it does not build.
    """
    heads = next((config[key] for key in _HEADS if isinstance(config.get(key), int)), 1)
    width = next((config[key] for key in _WIDTHS if isinstance(config.get(key), int)), None)
    narrow: Config = {}
    for key, value in config.items():
        if isinstance(value, dict):
            narrow[key] = _plain_rotary(value)
        elif key.endswith(("_token_id", "_token_ids")):
            narrow[key] = 0 if isinstance(value, int) and value >= VOCABULARY else value
        elif type(value) is not int:
            narrow[key] = value
        else:
            narrow[key] = _narrow_value(key, value, width, heads)
    return narrow


def _narrow_value(key: str, value: int, width: int | None, heads: int) -> int:
    if key in _INNER:
        return 3 * HEAD_WIDTH * max(1, heads // 2)  # neither the width nor twice or four times it
    if value == width:
        return HEAD_WIDTH * heads
    sizes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    sizes |= dict.fromkeys(_HEAD_WIDTHS, HEAD_WIDTH) | dict.fromkeys(_RANKS, RANK)
    sizes |= dict.fromkeys(_POSITIONS, POSITIONS) | {"rotary_dim": HEAD_WIDTH // 2, "qk_rope_head_dim": HEAD_WIDTH}
    return min(value, sizes.get(key, value))


def _plain_rotary(value: Mapping[str, Any]) -> Config:
    """Return rotary settings without lists that are as long as a head is wide, or add up to that."""
    plain = {key: _plain_rotary(part) if isinstance(part, dict) else part for key, part in value.items()}
    if isinstance(plain.get("mrope_section"), list):  # of half a head
        others = len(plain["mrope_section"]) - 1
        plain["mrope_section"] = [HEAD_WIDTH // 2 - others, *[1] * others]
    for key in ("rope_type", "type"):
        if isinstance(plain.get(key), str) and plain[key] not in _PLAIN_ROTARY:
            kept = {k: v for k, v in plain.items() if k in ("rope_theta", "partial_rotary_factor")}
            return {**kept, key: "default"}
    return plain


def randomize(model: nn.Module) -> None:
    """Give a model weights on which every module counts.

    Outputs of matrices are about as large as their inputs: where they are much larger, activations are only met far
    from zero, and there SiLU and its like are homogeneous, as ReLU is everywhere. Vectors differ from 0 and 1.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    inputs = 1 if isinstance(module, nn.Embedding) else _fan_in(module, parameter)
                    parameter.normal_(0.0, inputs**-0.5)


def _fan_in(module: nn.Module, parameter: nn.Parameter) -> int:
    return parameter.shape[0] if is_conv1d(module) else parameter[0].numel()
