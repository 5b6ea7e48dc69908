"""Tensors read by their position against the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.model.coded import find_tensors
from quant_fairness_plugin.model.reading import read_parts, read_rows, read_tensor
from quant_fairness_plugin.model.resolve import resolve_model
from tests.model.checkpoints import shard


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_tensor_is_what_the_library_reads(tiny_model: Callable[..., Path], dtype: str) -> None:
    folder = tiny_model("gpt2", dtype=dtype)
    expected = load_file(folder / "model.safetensors")
    found = find_tensors(resolve_model(str(folder)))
    assert found.keys() == expected.keys()
    for name, place in found.items():
        value = read_tensor(place)
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name])


def test_tensors_of_every_shard_are_found(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    weight_map = shard(folder)
    found = find_tensors(resolve_model(str(folder)))
    assert {name: place.path.name for name, place in found.items()} == weight_map
    assert all(torch.equal(read_tensor(place), expected[name]) for name, place in found.items())


@pytest.mark.parametrize("rows", [[0], [262, 263], [3, 4, 5, 90, 263], [7, 2, 2, 3], []])
def test_rows_are_read_in_the_order_asked_for(folder: Path, rows: list[int]) -> None:
    name = "model.embed_tokens.weight"
    expected = load_file(folder / "model.safetensors")[name]
    assert torch.equal(read_rows(find_tensors(resolve_model(str(folder)))[name], rows), expected[rows])


def test_odd_types_and_shapes_are_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    odd = {
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "counts": torch.tensor([[1, 2, 3]]),
        "last": torch.arange(7).to(torch.uint8),
    }
    save_file(load_file(path) | odd, path)
    found = find_tensors(resolve_model(str(folder)))
    assert all(torch.equal(read_tensor(found[name]), value) for name, value in odd.items())


def test_a_file_that_ends_too_early_is_not_taken_for_memory_that_was_there(folder: Path) -> None:
    place = find_tensors(resolve_model(str(folder)))["model.norm.weight"]
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: place.offset + 5])
    with pytest.raises(ArtifactError, match=r"ends before its tensors do\. Get the file again"):
        read_tensor(place)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    place = find_tensors(resolve_model(str(folder)))["model.norm.weight"]
    place.path.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read \(No such file"):
        list(read_parts(place, [(0, 1)]))


def test_pickles_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="a pickle cannot be read tensor by tensor"):
        find_tensors(resolve_model(str(folder), allow_pickle=True))


def test_types_that_no_dense_model_has_are_refused(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ArtifactError, match="x holds values of type C64; expected F64, F32"):
        find_tensors(resolve_model(str(folder)))
