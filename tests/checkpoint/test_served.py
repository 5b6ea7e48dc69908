"""What is verified is also run in the dtype that its config says, since servers load it so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.checkpoint.served import compare_served
from quant_fairness_plugin.errors import ArtifactError


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def as_dtype(folder: Path, dtype: str, **weights: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in weights.items()}
    stored = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_within_the_range_of_its_dtype_passes(folder: Path, dtype: str) -> None:
    as_dtype(folder, dtype)
    said = compare_served(folder, [[1, 2, 3]])
    assert said.startswith(f"{dtype}: logits within 0.0")
    assert said.endswith("on 2 rows")


def test_activations_beyond_float16_are_refused_in_float16_and_not_in_bfloat16(folder: Path) -> None:
    down = torch.zeros(32, 64)
    down[7] = 60_000.0
    as_dtype(folder, "float16", model__layers__0__mlp__down_proj__weight=down)
    with pytest.raises(ArtifactError, match=r"in float16, which its config\.json says .* NaN or infinite values"):
        compare_served(folder)
    as_dtype(folder, "bfloat16")
    assert compare_served(folder).startswith("bfloat16: logits within")


def test_rows_are_run_too(folder: Path) -> None:
    """A token that is large alone: not among those of every call."""
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    up = torch.zeros(64, 32)
    up[:, 0], table[7] = 60_000.0, 0.0
    table[7, 0] = 60_000.0
    as_dtype(
        folder, "float16", model__embed_tokens__weight=table, model__layers__0__mlp__up_proj__weight=up,
        model__layers__0__post_attention_layernorm__weight=torch.full((32,), 20.0),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="in float16"):
        compare_served(folder, [[7, 7]])
