"""Tensors that no module of a model has: which of them a genuine checkpoint may hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import empty_model, load_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.model.unread import SortedNames, roots, sort_names
from tests.wrappers import wrapper_config

BLOCK = ("input_layernorm.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight")
MORE = (*(f"model.layers.2.{name}" for name in BLOCK), "model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight")
"""A layer that predicts a further token, as DeepSeek publishes it: a block, and modules that no block has."""


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), copy)
    return copy


def add(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    added = {name: torch.randn(5, 3).half() for name in names}
    path = folder / "model.safetensors"
    save_file(load_file(path) | added, path, {"format": "pt"})
    return added


def sorted_names(folder: Path, *names: str) -> SortedNames:
    model = empty_model(resolve_model(str(folder)))
    return sort_names(model, detect_family(model), [*load_file(folder / "model.safetensors"), *names])


@pytest.mark.parametrize(
    "names",
    [
        MORE,
        ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight"),
        ("score.weight", "value_head.bias"),
    ],
)
def test_extra_layers_and_heads_are_only_copied(folder: Path, names: tuple[str, ...]) -> None:
    kinds = sorted_names(folder, *names)
    assert kinds.unread == list(names)
    assert not kinds.strays
    assert not kinds.parts
    assert set(kinds.own) == set(load_file(folder / "model.safetensors"))
    add(folder, *names)
    loaded, streamed = load_model(str(folder)), open_streamed(str(folder))
    assert loaded.layers == streamed.layers == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.bias",  # of a module that the model has, without one
        "model.layers.1.mlp.other_proj.weight",  # in a block that the model has
        "model.layers.2.mlp.up_proj.weight",  # of an ordinary block, which the config does not count
        "model.extra",
    ],
)
def test_what_belongs_to_the_model_and_is_too_much_is_an_error(folder: Path, name: str) -> None:
    assert sorted_names(folder, name).strays == [name]
    add(folder, name)
    for load in (load_model, open_streamed):
        with pytest.raises(ArtifactError, match=f"1 unexpected: {name}"):
            load(str(folder))


def test_a_name_that_something_missing_may_have_is_an_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    for load in (load_model, open_streamed):
        with pytest.raises(ArtifactError, match=r"1 missing: model\.norm\.weight; 1 unexpected: encoder\.norm\.weight"):
            load(str(folder))


def test_tables_are_left_out(folder: Path) -> None:
    kinds = sorted_names(folder, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not kinds.copied
    assert not kinds.strays


def test_the_other_parts_of_a_wrapper_are_no_text() -> None:
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(wrapper_config("gemma3"))  # type: ignore[no-untyped-call]
    family = detect_family(model)
    stored = ["vision_tower.vision_model.post_layernorm.weight", "language_model.model.norm.weight", "vision_tower.new"]
    kinds = sort_names(model, family, stored)
    assert kinds.own == {"language_model.model.norm.weight": "model.language_model.norm.weight"}
    assert kinds.parts == [stored[0], stored[2]]
    assert not kinds.strays


def test_roots_never_reach_into_the_model() -> None:
    own = ["model.layers.0.a.weight", "model.layers.1.a.weight", "model.norm.weight"]
    unread = ["model.layers.10.a.weight", "model.layers.10.b.weight", "mtp.layers.0.x", "model.layers.1.k.weight"]
    assert roots(own, unread) == ("model.layers.10", "mtp", "model.layers.1.k")
