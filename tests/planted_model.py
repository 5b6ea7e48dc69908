"""A tiny model that is built, not trained: what quantization does to it follows from how its weights are set.

Two "languages" with disjoint alphabets, and the table of which byte follows which in them. The head is drawn at random,
and each byte has a goal: the hidden state from which the head reads this byte's row of the table. Bytes start at random
embeddings; in layers 0, 2 and 3 one MLP channel for each byte opens to this byte and moves it a share of the way.
Attention adds a little of what came before. Layer 1 does nothing (its outputs are zero).

In layer 2, the channels of the second language's bytes are scaled by a power of two in `up_proj` and back in
`down_proj`: the 16-bit model computes exactly the same, but in a group of INT4 weights these columns vanish. Quantizing
layer 2 takes its share of the way from that language; everything else that quantization does is rounding.

Weights are sums and well-conditioned solutions in float64, so that CPUs differ by units in the last place of float16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import TextSet
from tests.tiny import VOCABULARY, byte_tokenizer

Array = NDArray[np.float64]
LAYERS, WIDTH, CHANNELS = 4, 32, 64
IDLE_LAYER, PLANTED_LAYER = 1, 2
SHARES = {0: 0.3, IDLE_LAYER: 0.0, PLANTED_LAYER: 0.4, 3: 1.0}
"""Of the way that is left to the goals."""
SHRINK = 16.0
"""A hidden weight of any usual size is below half a step of INT4 (a 14th of the group's largest), and far above one of
INT8 (a 127th)."""
SHARPNESS, APART = 3.0, 20.0
"""Of the channels: the slope of the gate, and how much more being open to the own byte counts than being closed."""
ATTENTION = 0.1
UNSEEN = 2.0
"""Counts given to what never follows: the model is less sure than the texts allow, so that losing any of it costs."""
WORDS = {
    "en": ("cedar", "lamp", "river", "stone", "bread", "window"),
    "he": ("ארז", "מנורה", "נהר", "אבן", "לחם", "חלון"),
}
SENTENCES = 60


@dataclass(frozen=True, slots=True)
class Bigrams:
    """Which byte follows which: `counts[i, j]` is how often token `ids[j]` follows `ids[i]`."""

    ids: list[int]
    counts: Array
    hurt: list[int]
    """Places in `ids` that only the second language has."""


_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def planted_texts() -> TextSet:
    """60 sentences of five words, in every part the same kind."""
    draw = np.random.default_rng(0)
    picks = draw.integers(0, 6, size=(SENTENCES, 5))
    parts = ("calibrate", "search", "confirm")
    return TextSet(
        name="planted",
        sentences={
            language: tuple(f"{i} " + " ".join(words[k] for k in row) for i, row in enumerate(picks))
            for language, words in WORDS.items()
        },
        ids=tuple(f"s{i}" for i in range(SENTENCES)),
        parts=tuple(parts[i % 3] for i in range(SENTENCES)),
        registers=("",) * SENTENCES,
        parallel=True,
        sha256="0" * 64,
    )


def write_planted_model(folder: Path, *, seed: int = 0, shrink: float = SHRINK) -> None:
    """Build the model and save it in float16; without shrinking (1) the same model, in which no layer is special."""
    weights = {name: torch.from_numpy(value) for name, value in planted_weights(seed, shrink).items()}
    _save(LlamaForCausalLM(LlamaConfig(**_CONFIG)), weights, folder)


def write_planted_mixture(folder: Path) -> None:
    """Build the same model as a mixture: every layer has two equal experts, and half of each is what the MLP was."""
    weights = {name: torch.from_numpy(value) for name, value in planted_weights(0, SHRINK).items()}
    for layer in range(LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up]).expand(2, -1, -1)
        weights[f"{mlp}.experts.down_proj"] = down.expand(2, -1, -1)
        weights[f"{mlp}.gate.weight"] = torch.zeros(2, WIDTH)
    config = MixtralConfig(**_CONFIG, num_local_experts=2, num_experts_per_tok=2)
    _save(MixtralForCausalLM(config), weights, folder)


def _save(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    model.load_state_dict(weights)
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type] # Transformers types `to` as a method
    byte_tokenizer().save_pretrained(folder)


def planted_weights(seed: int, shrink: float) -> dict[str, Array]:
    """All parameters by name."""
    draw, bigrams = np.random.default_rng(seed), count_bigrams()
    head, goals = _head(draw, bigrams)
    embedding = draw.standard_normal((VOCABULARY, WIDTH))
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(WIDTH)}
    states = embedding[bigrams.ids]
    for layer in range(LAYERS):
        block = _attention(draw, layer) | {
            f"{name}_layernorm.weight": draw.uniform(0.9, 1.1, WIDTH) for name in ("input", "post_attention")
        }
        inputs = _normed(states) * block["post_attention_layernorm.weight"]
        gate, up = draw.standard_normal((2, CHANNELS, WIDTH)) / WIDTH**0.5
        own = draw.permutation(CHANNELS)[: len(states)]
        keys = _keys(inputs)
        gate[own], up[own] = SHARPNESS * keys, keys
        opened = _opened(inputs, gate, up)
        down = _ridge(opened, SHARES[layer] * (goals - states), 0.03).T
        states = states + opened @ down.T
        if layer == PLANTED_LAYER:
            hidden = own[bigrams.hurt]
            up[hidden] *= shrink
            down[:, hidden] /= shrink
        block |= {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
        weights |= {f"model.layers.{layer}.{name}": value for name, value in block.items()}
    return weights


def count_bigrams() -> Bigrams:
    """Of all sentences, with BOS."""
    tokenizer, texts = byte_tokenizer(), planted_texts()
    first, second = ([[0, *tokenizer(s)["input_ids"]] for s in rows] for rows in texts.sentences.values())
    pairs = Counter(pair for row in first + second for pair in pairwise(row))
    ids = sorted({token for pair in pairs for token in pair})
    counts = np.zeros((len(ids), len(ids)))
    for (before, after), count in pairs.items():
        counts[ids.index(before), ids.index(after)] = count
    hurt = {token for row in second for token in row} - {token for row in first for token in row}
    return Bigrams(ids, counts, [ids.index(token) for token in sorted(hurt)])


def _head(draw: np.random.Generator, bigrams: Bigrams) -> tuple[Array, Array]:
    """The head, and the state of each byte from which it reads log-probabilities: [vocabulary, width], [bytes, width].

    Every goal has the length that the final norm gives it anyway: 1 in the first coordinate, which the head reads as a
    bias, and what is missing in the second, which it does not read.
    """
    shares = bigrams.counts + UNSEEN
    table = np.log(shares / shares.sum(axis=1, keepdims=True))
    table -= table.mean(axis=1, keepdims=True)
    head = 0.15 * draw.standard_normal((VOCABULARY, WIDTH))
    head[:, :2] = -6.0, 0.0  # of bytes that never occur
    read = 0.55 * draw.standard_normal((len(table), WIDTH - 2))
    head[bigrams.ids, 0], head[bigrams.ids, 2:] = table.mean(axis=0), read
    goals = np.ones((len(table), WIDTH))
    for goal, row, seen in zip(goals, table, bigrams.counts > 0, strict=True):
        goal[2:] = _ridge(read, row - table.mean(axis=0), 0.3, np.where(seen, 1.0, 0.1))
        goal[1] = np.sqrt(WIDTH - 1 - np.square(goal[2:]).sum())
    return head, goals


def _attention(draw: np.random.Generator, layer: int) -> dict[str, Array]:
    """Random, and adding little."""
    rows = {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2, "o": WIDTH}
    sizes = {"o": 0.0 if layer == IDLE_LAYER else ATTENTION}
    return {
        f"self_attn.{name}_proj.weight": sizes.get(name, 1.0) * draw.standard_normal((count, WIDTH)) / WIDTH**0.5
        for name, count in rows.items()
    }


def _keys(inputs: Array) -> Array:
    """For each byte a direction in which it is near 1 and every other byte near -1 or, where that is far, below 0."""
    count = len(inputs)
    apart = np.where(np.eye(count), APART, 1.0)
    return np.stack([_ridge(inputs, 2 * np.eye(count)[i] - 1, 0.5, apart[i]) for i in range(count)])


def _opened(inputs: Array, gate: Array, up: Array) -> Array:
    """What the MLP's channels hold: [bytes, channels]."""
    gates = inputs @ gate.T
    return gates / (1 + np.exp(-gates)) * (inputs @ up.T)


def _normed(states: Array) -> Array:
    return states / np.sqrt(np.square(states).mean(axis=1, keepdims=True) + 1e-6)


def _ridge(inputs: Array, wanted: Array, ridge: float, weights: Array | float = 1.0) -> Array:
    """The X of least Σ weights · (inputs · X - wanted)² + ridge · X²."""
    weighted = inputs.T * weights
    return np.linalg.solve(weighted @ inputs + ridge * np.eye(inputs.shape[1]), weighted @ wanted)
