"""Small models with random weights: near zero where activations bend, narrow, and of the class of the large one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from quant_fairness_plugin.model.small import (
    HEAD_WIDTH,
    count_layers,
    narrow_models,
    narrowed,
    randomize,
    shortened,
    small_model,
)
from tests.wrappers import wrapper_config


def test_activations_are_met_where_they_are_not_homogeneous() -> None:
    """Without norms before its MLP, this model's gates would be far from zero with weights of one size for all."""
    config = Olmo2Config(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, pad_token_id=0,
    )  # fmt: skip
    model = Olmo2ForCausalLM(config).eval()
    randomize(model)
    seen: list[Tensor] = []
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 33)[None])
    assert float((seen[0].abs() < 3).float().mean()) > 0.5


def test_narrow_layers_have_as_many_heads_and_build() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("cohere2"))
    config = narrowed(shortened(model.config.to_dict(), 2))
    assert config["num_attention_heads"] == model.config.num_attention_heads
    assert config["hidden_size"] == HEAD_WIDTH * config["num_attention_heads"]
    narrow = next(narrow_models(model, 2, lambda outline: True))
    assert type(narrow) is type(model)
    assert (len(narrow.model.layers), narrow.dtype) == (2, torch.float32)


def test_of_a_model_with_several_parts_the_text_decoder_is_shortened() -> None:
    whole = wrapper_config("qwen3_vl", layers=5).to_dict()
    short = shortened(whole, 2)
    assert (count_layers(whole), count_layers(short)) == (5, 2)
    assert short["vision_config"] == whole["vision_config"]


@pytest.mark.parametrize("layers", [2, 5])
def test_a_small_model_is_not_deeper_than_the_model(layers: int) -> None:
    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    small = small_model(Olmo2ForCausalLM(config))
    assert small is not None
    assert len(small.model.layers) == 2
