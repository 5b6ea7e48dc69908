"""Changes to a model folder on disk, and the error that it then gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.errors import QuantFairnessError
from quant_fairness_plugin.model.resolve import resolve_model

INDEX = "model.safetensors.index.json"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(path: Path, *keys: str) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))


def shard(folder: Path) -> dict[str, str]:
    """Split `model.safetensors` into two shards with an index; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refused(name: str | Path, **options: Any) -> str:
    """The error's text, after checking that it is one line that a terminal can show."""
    with pytest.raises(QuantFairnessError, match=r"\A[^\n]+\Z") as caught:
        resolve_model(str(name), **options)
    return f"{type(caught.value).__name__}: {caught.value}"
