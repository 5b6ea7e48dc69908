"""Architectures without a record, from a folder to a checkpoint that Transformers reads back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.tracing.steering import STEERS
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.walk import score_plans
from tests.export.build import TEXTS
from tests.planning import quantize_layers
from tests.tiny import byte_tokenizer
from tests.traced import traced_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own code warns
GRID = Grid(group_size=32)
LAYERS = {"lfm2": 12}
"""Where layer 1 must not be taken for 10 and 11; the fewest elsewhere."""


def write(model_type: str, folder: Path) -> Path:
    traced_model(model_type, LAYERS.get(model_type)).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["phi3", "cohere2", "gemma2", "olmo2", "minicpm3", "lfm2", "qwen3_5_text"])
def test_transformers_reads_what_was_written(tmp_path: Path, model_type: str) -> None:
    loaded = load_model(str(write(model_type, tmp_path / "m")))
    last = f"layers.{loaded.layers - 1}"
    overrides: dict[str, Precision] = {f"{last}.{loaded.family.units_of(loaded.layers - 1)[0].name}": "fp16"}
    quantized = quantize_layers(loaded, [1], method="rtn", grid=GRID, overrides=overrides)
    out = tmp_path / "out"
    record = export(quantized, out, texts=TEXTS)
    assert record.family == loaded.family.name == model_type
    kept = {name for name in load_file(out / "model.safetensors") if name.endswith(".weight")}
    prefix = f"{loaded.family.blocks}.1."
    assert {f"{prefix}{name}.weight" for name in loaded.family.modules(1)} <= kept
    packed = sorted(name for name in safetensors_names(out) if name.endswith(".weight_packed"))
    assert packed == sorted(f"{name}.weight_packed" for name in quantized.tensors)
    # The same comparison as in `verify`, by hand.
    reader = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        found, expected = reader(ids).logits, load_dense_model(out)(ids).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))  # float32 sums


def safetensors_names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_what_steers_a_recurrent_state_is_written_in_16_bit_with_its_reason(tmp_path: Path) -> None:
    loaded = load_model(str(write("qwen3_5_text", tmp_path / "m")))
    quantized = quantize_layers(loaded, [3], method="rtn", grid=GRID)
    steering = {f"model.layers.{layer}.linear_attn.in_proj_{part}" for layer in range(3) for part in "ab"}
    assert quantized.kept == dict.fromkeys(sorted(steering), STEERS)
    record = export(quantized, tmp_path / "out", texts=TEXTS)
    assert record.kept_modules == quantized.kept
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert steering <= set(ignored)


def test_layers_that_share_keys_are_quantized_and_not_swept(tmp_path: Path) -> None:
    loaded = load_model(str(write("gemma4_text", tmp_path / "m")))
    quantized = quantize_layers(loaded, [1], method="rtn", grid=GRID)
    export(quantized, tmp_path / "out", texts=TEXTS)
    units = map_units(loaded)
    plans: dict[str, dict[str, Precision]] = {"first": {"layers.0": "int4"}, "last": {"layers.5": "int4"}}
    with pytest.raises(UnsupportedModelError, match="take keys and values from earlier ones"):
        score_plans(loaded, plans, TEXTS, units=units, bank=RtnBank(loaded, units, GRID))
