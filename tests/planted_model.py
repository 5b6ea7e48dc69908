"""A tiny trained model with planted effects: what quantization does to it is known before anything is measured.

Two "languages" with disjoint alphabets. Layer 1 does nothing (its outputs are zero). In layer 2, the MLP channels that
the second language reads most are scaled by a power of two in `up_proj` and back in `down_proj`: the 16-bit model
computes exactly the same, but in a group of INT4 weights these columns vanish: quantizing layer 2 hurts that language.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import TextSet
from tests.tiny import VOCABULARY, byte_tokenizer

LAYERS, WIDTH, CHANNELS = 4, 32, 64
IDLE_LAYER, PLANTED_LAYER, PLANTED_CHANNELS = 1, 2, 12
SHRINK = 64.0
WORDS = {
    "en": ("cedar", "lamp", "river", "stone", "bread", "window"),
    "he": ("ארז", "מנורה", "נהר", "אבן", "לחם", "חלון"),
}
SENTENCES = 60


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


def write_planted_model(folder: Path) -> None:
    """Train for some seconds, plant, and save in float16."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=CHANNELS,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    texts = planted_texts()
    rows = [[0, *tokenizer(s)["input_ids"]] for rows in texts.sentences.values() for s in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    _train(model, ids, steps=120)
    _plant(model, ids[:SENTENCES], ids[SENTENCES:])
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type] # Transformers types `to` as a method
    tokenizer.save_pretrained(folder)


def _train(model: PreTrainedModel, ids: Tensor, *, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (24,))]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            idle = model.model.layers[IDLE_LAYER]
            idle.self_attn.o_proj.weight.zero_()
            idle.mlp.down_proj.weight.zero_()


@torch.no_grad()
def _plant(model: PreTrainedModel, spared: Tensor, hurt: Tensor) -> None:
    """Hide the channels that the `hurt` rows read much more than the `spared` rows do."""
    mlp = model.model.layers[PLANTED_LAYER].mlp
    channels = (_reach(model, hurt) - 3 * _reach(model, spared)).topk(PLANTED_CHANNELS).indices
    mlp.up_proj.weight[channels] *= SHRINK
    mlp.down_proj.weight[:, channels] /= SHRINK


def _reach(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """How much each MLP channel of the planted layer contributes to its output on these rows: [channels]."""
    mlp = model.model.layers[PLANTED_LAYER].mlp
    seen: list[Tensor] = []
    hook = mlp.down_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False)
    hook.remove()
    weights = (ids != 0).float()[..., None]
    return (seen[0].abs() * weights).sum(dim=(0, 1)) / weights.sum() * mlp.down_proj.weight.norm(dim=0)
