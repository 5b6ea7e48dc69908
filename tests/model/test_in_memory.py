"""A model in memory is copied as its files would be loaded, and is not changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.in_memory import copy_model
from quant_fairness_plugin.model.load import LoadedModel, load_model
from tests.tiny import byte_tokenizer, tiny_config

TINY = {"layers": 2, "width": 32}


def in_memory(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def assert_equal(copied: LoadedModel, loaded: LoadedModel) -> None:
    assert copied.storage_dtype == loaded.storage_dtype
    assert copied.family == loaded.family
    assert (copied.files.name, copied.layers) == (loaded.files.name, loaded.layers)
    ours, theirs = (dict(given.model.named_parameters()) for given in (copied, loaded))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
        assert (ours[name].dtype, ours[name].requires_grad) == (torch.float32, False)
    for name, buffer in loaded.model.named_buffers():
        assert torch.equal(copied.model.get_buffer(name), buffer), name


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_copy_is_what_the_files_would_give(tiny_model: Callable[..., Path], family: str, stored: str) -> None:
    folder = tiny_model(family, dtype=stored)
    loaded = load_model(str(folder))
    for dtype in (torch.float32, getattr(torch, stored)):
        assert_equal(copy_model(in_memory(folder, dtype), byte_tokenizer()), loaded)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_tables_that_were_rounded_with_the_weights_are_computed_again(
    tiny_model: Callable[..., Path], family: str
) -> None:
    folder = tiny_model(family)
    cast = in_memory(folder, torch.float32).half()
    before = {name: buffer.clone() for name, buffer in cast.named_buffers()}
    assert any(buffer.dtype == torch.float16 for buffer in before.values())
    assert_equal(copy_model(cast, byte_tokenizer()), load_model(str(folder)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in cast.named_buffers())


def test_the_model_that_is_given_is_not_changed_and_shares_no_memory(tiny_model: Callable[..., Path]) -> None:
    model = in_memory(tiny_model("llama", dtype="float32"), torch.float32).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = copy_model(model, byte_tokenizer())
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not copied.model.training


def test_tied_weights_stay_tied() -> None:
    config = tiny_config("llama", **TINY)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    copied = copy_model(LlamaForCausalLM(config), byte_tokenizer())
    assert copied.model.lm_head.weight is copied.model.model.embed_tokens.weight
    assert copied.family.tied_head


def test_a_model_that_was_never_saved_says_its_class_and_not_where_it_is_from(tiny_model: Callable[..., Path]) -> None:
    fresh = copy_model(LlamaForCausalLM(tiny_config("llama", **TINY)), byte_tokenizer())
    assert fresh.files.config["architectures"] == ["LlamaForCausalLM"]
    assert fresh.files.name == "LlamaForCausalLM"
    folder = tiny_model("llama")
    assert str(folder) not in str(copy_model(in_memory(folder, torch.float16), byte_tokenizer()).files)


def untie(model: Any) -> None:
    model.config.tie_word_embeddings = True


def spread(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.to("meta"))


def poison(model: Any) -> None:
    model.model.norm.weight.data[3] = torch.nan


def overflow(model: Any) -> None:
    model.model.norm.weight.data[3] = 1e6 + 1 / 64


def mark_quantized(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (untie, UnsupportedModelError, r"tie_word_embeddings.*tie_weights\(\)"),
        (spread, UnsupportedModelError, "spread over cpu, meta; models on one device"),
        (poison, ArtifactError, r"model\.norm\.weight holds NaN"),
        (overflow, UnsupportedModelError, "float16 ends at"),
        (mark_quantized, UnsupportedModelError, "already quantized"),
    ],
)
def test_a_model_that_no_checkpoint_would_hold_is_refused(
    change: Callable[[Any], None], kind: type[Exception], message: str
) -> None:
    model = LlamaForCausalLM(tiny_config("llama", **TINY))
    change(model)
    with pytest.raises(kind, match=message) as caught:
        copy_model(model, byte_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tokenizer", "message"), [(None, "needs its tokenizer"), ("gpt2", "got a str as its")])
def test_the_tokenizer_is_needed(tokenizer: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        copy_model(LlamaForCausalLM(tiny_config("llama", **TINY)), tokenizer)
