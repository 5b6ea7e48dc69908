from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.reading import read_tensor
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.stacked_files import single_shapes, single_tensors

OWNER = "model.layers.0.mlp.experts"


def write(folder: Path, stack: torch.Tensor, model_type: str, **config: Any) -> ModelFiles:
    path = folder / "model.safetensors"
    tensors = {f"{OWNER}.gate_up_proj": stack, "model.norm.weight": torch.ones(3)}
    save_file(tensors | config.pop("more", {}), path)
    return ModelFiles("stacked", folder, {"model_type": model_type} | config, (path,), 1, None)


def test_every_matrix_of_a_stack_is_found_where_it_lies(tmp_path: Path) -> None:
    stack = torch.arange(2 * 6 * 5, dtype=torch.float32).reshape(2, 6, 5)
    files = write(tmp_path, stack, "mixtral")
    places = single_tensors(files)
    assert places.keys() == single_shapes(files).keys()
    assert {name: place.shape for name, place in places.items()} == {
        name: shape for name, (_, shape) in single_shapes(files).items()
    }
    for expert in range(2):
        assert torch.equal(read_tensor(places[f"{OWNER}.{expert}.w1.weight"]), stack[expert, :3])
        assert torch.equal(read_tensor(places[f"{OWNER}.{expert}.w3.weight"]), stack[expert, 3:])


def test_stacks_of_families_that_are_not_taken_stay_as_they_are(tmp_path: Path) -> None:
    files = write(tmp_path, torch.zeros(2, 6, 5), "granitemoe")
    assert set(single_shapes(files)) == set(single_tensors(files)) == {f"{OWNER}.gate_up_proj", "model.norm.weight"}


def test_a_stack_in_8_bits_is_refused(tmp_path: Path) -> None:
    stack = torch.zeros(2, 6, 5).to(torch.float8_e4m3fn)
    scales = {f"{OWNER}.gate_up_proj_scale_inv": torch.ones(2, 6, 1)}
    settings = {"quant_method": "fp8", "weight_block_size": None}
    files = write(tmp_path, stack, "qwen3_5_moe", quantization_config=settings, more=scales)
    with pytest.raises(UnsupportedModelError, match=r"stacks experts in 8 or 4 bits.*use the model in 16 bit"):
        single_tensors(files)
