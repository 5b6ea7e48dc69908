"""What measuring the weights of a folder leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import RECORD_NAME
from quant_fairness_plugin.checkpoint.others import weights_alone
from quant_fairness_plugin.model.gguf import SOURCE

ACTIVATIONS = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"input_activations": {"num_bits": 8}}},
}
WEIGHTS = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"input_activations": None}}}


def folder(path: Path, quantization: dict[str, Any] | None, *files: str) -> Path:
    config = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for name in files:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize(
    ("quantization", "files", "said"),
    [
        (None, (), ""),
        (WEIGHTS, (), ""),
        (ACTIVATIONS, (), "servers also round the activations"),
        ({"quant_method": "fp8"}, (), "servers also round the activations"),
        (None, (SOURCE,), "llama.cpp also rounds"),  # the values of a GGUF file
        (WEIGHTS, (SOURCE,), ""),  # a checkpoint of ours, made from a GGUF file
        (None, (SOURCE, RECORD_NAME), ""),  # the same as a 16-bit twin
    ],
)
def test_it_says_what_servers_round_beside_the_weights(
    tmp_path: Path, quantization: dict[str, Any] | None, files: tuple[str, ...], said: str
) -> None:
    found = weights_alone(folder(tmp_path, quantization, *files))
    assert (said in found) if said else found == ""
