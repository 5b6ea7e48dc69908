"""Weight files that are written tensor by tensor: what other readers read from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from quant_fairness_plugin.errors import ResourceError
from quant_fairness_plugin.export import shards
from quant_fairness_plugin.export.shards import write_shards
from quant_fairness_plugin.model.reading import places_of_file


def test_tensors_of_all_types_are_read_back_and_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}".removeprefix("torch."): torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.int32, torch.float32, torch.int64)
    } | {"scalar": torch.tensor(7, dtype=torch.int64), "empty": torch.zeros(0, 3), "turned": torch.randn(4, 3).t()}
    write_shards(tensors.items(), tmp_path)
    path = tmp_path / "model.safetensors"
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % 8 == 0
    assert all((place.offset - start) % place.dtype.itemsize == 0 for _, place in places_of_file(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_an_error_that_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.shutil, "copyfileobj", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_shards({"a": torch.zeros(3)}.items(), tmp_path)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".safetensors"]
