from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.errors import (
    ArtifactError,
)
from quant_fairness_plugin.model.resolve import resolve_model, tensor_shapes
from tests.model.checkpoints import INDEX, refused, shard


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "ArtifactError" in refused(folder)
    assert "no weights; expected model.safetensors or model.safetensors.index.json" in refused(folder)


def test_pickle_weights_need_consent(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "only pickle weights (pytorch_model.bin), which can run code when opened" in refused(folder)
    assert "--allow-pickle" in refused(folder / "pytorch_model.bin")
    files = resolve_model(str(folder), allow_pickle=True)
    assert files.weights == (folder / "pytorch_model.bin",)
    with pytest.raises(ArtifactError, match="a pickle does not list its tensors"):
        tensor_shapes(files)


def test_safetensors_are_preferred_to_pickles_even_with_consent(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert resolve_model(str(folder), allow_pickle=True).weights == (folder / "model.safetensors",)


def test_a_pickle_under_another_name_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.pt")
    assert "weights.pt is not read; expected pytorch_model.bin" in refused(folder, allow_pickle=True)


def test_a_pickle_renamed_to_safetensors_is_refused_and_named(folder: Path) -> None:
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    assert "model.safetensors: not a well-formed safetensors file" in refused(folder)


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    assert "model.safetensors: holds no tensors" in refused(folder)


def test_weights_under_another_name_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "weights.safetensors without model.safetensors.index.json" in refused(folder)
    assert "Rename the only file" in refused(folder / "weights.safetensors")


def test_a_safetensors_file_that_is_not_the_models_is_refused(folder: Path) -> None:
    save_file({"a": torch.zeros(3)}, folder / "other.safetensors")
    assert "other.safetensors: not the weights of the model in its folder" in refused(folder / "other.safetensors")


def test_a_folder_of_gguf_files_is_refused_and_names_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert "UnsupportedModelError" in refused(folder)
    assert "GGUF" in refused(folder)
    (folder / "config.json").unlink()
    assert "Name one of the files, such as model.gguf" in refused(folder)


def test_an_adapter_is_refused_even_beside_whole_weights(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    assert "UnsupportedModelError" in refused(folder)
    assert "a LoRA adapter (adapter_config.json), not a whole model" in refused(folder)


def test_an_absent_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "1 of its files are missing: model-00002-of-00002.safetensors" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "https://example.org/model.safetensors",
        ".model.safetensors",
        "nul\0.safetensors",
        "model.bin",
        "",
    ],
)
def test_an_index_that_points_out_of_its_folder_is_refused(folder: Path, name: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    text = refused(folder)
    assert text.startswith("ArtifactError")
    assert "expected names of .safetensors files in the same folder" in text


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(folder: Path, content: str) -> None:
    shard(folder)
    (folder / INDEX).write_text(content)
    assert "index.json: needs a 'weight_map'" in refused(folder)


def test_tensors_that_the_index_does_not_know_are_listed(folder: Path) -> None:
    weight_map = shard(folder)
    first, second = sorted(weight_map)[:2]
    swapped = weight_map | {first: weight_map[second]}
    (folder / INDEX).write_text(json.dumps({"weight_map": swapped}))
    assert f"1 tensors in another file than it says: {first}" in refused(folder)
    del weight_map[first]
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"ghost": weight_map[second]}}))
    assert f"(1 tensors in no file: ghost; 1 tensors not in the index: {first})" in refused(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weight_map = shard(folder)
    first = sorted(weight_map)[0]
    path = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | load_file(folder / weight_map[first]), path)
    assert f"tensor '{first}' is in model-00001-of-00002.safetensors too" in refused(folder)


def test_stale_weight_files_are_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    assert "do not belong to its model: model-00001-of-00001.safetensors" in refused(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    shard(folder)
    (folder / "copy.safetensors").rename(folder / "model.safetensors")
    assert "do not belong to its model: model.safetensors" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    assert "ArtifactError" in refused(folder)
    assert f"{name}: a link that leaves the model's folder" in refused(folder)


def test_a_link_inside_the_folder_is_allowed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "store")
    (folder / "model.safetensors").symlink_to("store")
    assert resolve_model(str(folder)).layers == 2
