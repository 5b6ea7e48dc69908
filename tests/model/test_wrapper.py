"""Where the text decoder of a model with several parts is, and what its tensors are called on disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.model.wrapper import Wrapper, find_wrapper
from tests.tiny import tiny_config
from tests.wrappers import WRAPPERS, make_wrapper, write_wrapper


@pytest.mark.parametrize("kind", [*WRAPPERS, "qwen2_5_vl"])
def test_names_on_disk_are_those_that_transformers_saves(kind: str, tmp_path: Path) -> None:
    model = make_wrapper(kind)
    model.save_pretrained(tmp_path)
    wrapper = find_wrapper(model)
    assert wrapper is not None
    assert wrapper.decoder == "model.language_model"
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    own = {name for name, _ in model.named_parameters() if wrapper.owns(name)}
    others = {name for name, _ in model.named_parameters()} - own
    assert {wrapper.stored_name(name) for name in own} <= stored
    assert {wrapper.loaded_name(wrapper.stored_name(name)) for name in own} == own
    assert others
    assert all(name.startswith(wrapper.parts) for name in others)


def test_a_name_is_changed_at_whole_parts_only() -> None:
    wrapper = Wrapper("model.text", "head", ("model.eye",), (("model.text", "text.model"), ("head", "text.head")))
    assert wrapper.stored_name("model.text.layers.1.q") == "text.model.layers.1.q"
    assert wrapper.stored_name("model.textual.q") == "model.textual.q"
    assert wrapper.loaded_name("text.head.weight") == "head.weight"
    assert wrapper.loaded_name("text.model2.weight") == "text.model2.weight"
    assert not wrapper.owns("model.texture")
    assert wrapper.owns("model.text.norm")


def test_a_model_that_is_all_text_has_no_wrapper(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", layers=2, width=32))  # type: ignore[no-untyped-call]
    assert find_wrapper(model) is None
    assert detect_family(model).wrapper is None


@pytest.mark.parametrize("kind", WRAPPERS)
def test_only_the_text_decoder_is_searched_for_blocks(kind: str) -> None:
    family = detect_family(make_wrapper(kind, layers=3))
    assert family.blocks == "model.language_model.layers"
    assert family.embeddings == ("model.language_model.embed_tokens",)
    assert family.final_norm == "model.language_model.norm"
    assert family.head == "lm_head"
    assert family.tied_head == (kind == "gemma3")


@torch.no_grad()
@pytest.mark.parametrize("kind", WRAPPERS)
def test_block_by_block_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    write_wrapper(tmp_path, kind, layers=3)
    whole, streamed = load_model(str(tmp_path)), open_streamed(str(tmp_path))
    ids = torch.tensor([[0, 9, 200, 31, 7]])
    others = [p for name, p in streamed.model.named_parameters() if not streamed.family.owns(name)]
    assert others
    assert not any(any(parameter.stride()) for parameter in others)
    with ExitStack() as stack:
        for layer in range(3):
            stack.enter_context(streamed.resident(layer))
        stack.enter_context(streamed.widened(list(streamed.tables)))
        found = streamed.model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, whole.model(input_ids=ids, use_cache=False).logits)


def test_code_of_a_wrapper_that_transformers_has_is_not_run(tmp_path: Path) -> None:
    from quant_fairness_plugin.model.resolve import resolve_model
    from tests.model.checkpoints import edit

    write_wrapper(tmp_path, "gemma3")
    edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    files = resolve_model(str(tmp_path))
    assert not files.runs_code
    assert "auto_map" not in files.config
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gemma3"
