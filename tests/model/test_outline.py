from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.measure.rows import position_limit
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import BUNDLED, resolve_model
from tests.tiny import FAMILIES, byte_tokenizer, write_tiny_model


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), encoding="utf-8")


def rename_tensors(folder: Path, old: str, new: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in tensors.items()}, path)


def embedding_and_head(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
def test_outline_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family, layers=3)
    loaded, outline = load_model(str(tmp_path)), outline_model(resolve_model(str(tmp_path)))
    assert outline.family == loaded.family
    assert outline.shapes == {name: tuple(p.shape) for name, p in loaded.model.named_parameters()}
    assert outline.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert (outline.layers, outline.width, outline.vocabulary) == (3, 32, loaded.model.config.vocab_size)
    assert outline.table_shapes() == loaded.table_shapes()
    tables = {id(module.weight): tuple(module.weight.shape) for module in embedding_and_head(loaded.model)}
    assert outline.table_shapes() == [*tables.values()]
    assert outline.positions == position_limit(loaded.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_does_not_say_whether_the_head_is_tied(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family)
    edit_config(tmp_path, tie_word_embeddings=None)
    assert outline_model(resolve_model(str(tmp_path))).family == load_model(str(tmp_path)).family


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer.")])
def test_names_without_the_prefix_of_the_whole_model(family: str, prefix: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path, family)
    expected = outline_model(resolve_model(str(tmp_path)))
    rename_tensors(tmp_path, prefix, "")
    assert outline_model(resolve_model(str(tmp_path))) == expected
    assert load_model(str(tmp_path)).family == expected.family


def test_buffers_of_old_checkpoints_are_no_parameters(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gpt2")
    expected = outline_model(resolve_model(str(tmp_path)))
    path = tmp_path / "model.safetensors"
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(load_file(path) | mask | {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}, path)
    assert outline_model(resolve_model(str(tmp_path))) == expected


def test_an_unknown_architecture_is_built_without_memory(tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=264, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    GPTJForCausalLM(config).half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    outline, loaded = outline_model(resolve_model(str(tmp_path))), load_model(str(tmp_path))
    assert outline.family == loaded.family
    assert len(outline.family.kinds) == 2  # traced, a kind for each layer
    assert outline.shapes == {name: tuple(p.shape) for name, p in loaded.model.named_parameters()}
    assert outline.table_shapes() == loaded.table_shapes()
    own = [*([] if loaded.family.tied_head else ["lm_head.weight"])]
    assert len(outline.table_shapes()) == 1 + len(own)
    assert outline.positions == position_limit(loaded.model)


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    rename_tensors(tmp_path, "model.layers.", "model.other.")
    edit_config(tmp_path, model_type="no-such-type")
    with pytest.raises(ArtifactError, match="does not recognize"):
        outline_model(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("name", BUNDLED)
def test_no_torch_is_needed_for_the_bundled_models(name: str) -> None:
    outline = outline_model(resolve_model(name))
    assert outline.layers == 12
    assert outline.parameters > 1_000_000
