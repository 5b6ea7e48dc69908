"""Folders as other tools write them: our own exports with their metadata and names, layer 1 in 16 bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.checkpoint.folder import RECORD
from tests.export.conftest import rewrite_json

Tensors = dict[str, torch.Tensor]
LAYER_1 = "model.layers.1"
PARTS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def gptqmodel(folder: Path) -> None:
    """Version 7: `dynamic` is its only list."""
    rest = {"checkpoint_format": "gptq", "format": "gptq", "method": "gptq", "lm_head": False, "pack_dtype": "int32"}
    rules = {"dynamic": {r"-:^model\.layers\.(1)\..*": {}}, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    write(folder, GPTQ | rest | rules, side="quantize_config.json")


def autoround_gptq(folder: Path) -> None:
    """A rule for each unmerged module, and a list of names relative to a block."""
    rules = {rf"-:^model\.layers\.1\.{part}": {} for part in PARTS}
    lists = {"modules_in_block_to_quantize": [[part] for part in PARTS], "dynamic": rules}
    rest = {"block_name_to_quantize": "model.layers", "provider": "auto-round", "autoround_version": "0.15.1"}
    write(folder, GPTQ | lists | rest, side="quantize_config.json")


def autoround_mixed(folder: Path, wide: Collection[str]) -> None:
    """AutoScheme's: a rule for each module of 8 bits, as a pattern that the name may stand anywhere in."""
    rule = {"bits": 8, "group_size": 32, "sym": True}
    rules = {f"+:.*{re.escape(name)}.*": rule for name in wide}
    write(folder, GPTQ | {"dynamic": rules, "provider": "auto-round", "autoround_version": "0.16.1"})


def autoround_awq(folder: Path) -> None:
    """Full names, and no list for gptqmodel."""
    names = [f"{LAYER_1}.{part}" for part in PARTS]
    write(folder, AWQ | {"modules_to_not_convert": names, "provider": "auto-round"})


def autoawq(folder: Path) -> None:
    """A substring with a trailing dot, as its users write it, and a second file with names of its own."""
    write(folder, AWQ | {"modules_to_not_convert": [f"{LAYER_1}."]})
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(own))


def autogptq(folder: Path) -> None:
    """No lists, no format, weights under a name of their own, and a bias of zeros for every module."""
    names = {"model_file_base_name": "gptq_model-4bit-32g", "damp_percent": 0.01, "is_marlin_format": False}
    write(folder, GPTQ | names, side="quantize_config.json")
    change_tensors(folder, lambda tensors: tensors.update(zero_biases(tensors)))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")


def zero_biases(tensors: Tensors) -> Tensors:
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".scales")}
    return {name.removesuffix("scales") + "bias": torch.zeros(t.shape[1]).half() for name, t in scales.items()}


def write(folder: Path, quantization: dict[str, Any], *, side: str | None = None) -> None:
    """Replace our metadata by another tool's."""
    for name in (RECORD, "quantize_config.json"):
        (folder / name).unlink(missing_ok=True)
    rewrite_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    if side is not None:
        (folder / side).write_text(json.dumps(quantization))


def change_metadata(folder: Path, **changes: object) -> None:
    rewrite_json(folder / "config.json", lambda config: config["quantization_config"].update(changes))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def keep_one_part(tensors: Tensors, name: str = "model.layers.3.self_attn.q_proj") -> None:
    """One shard of a merged module in 16 bit, which no tool can have had a reason for."""
    rows, cols = tensors[f"{name}.qweight"].shape[1], tensors[f"{name}.g_idx"].shape[0]
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{suffix}"]
    tensors[f"{name}.weight"] = torch.zeros(rows, cols).half()
