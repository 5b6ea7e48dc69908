"""A sweep whose quantized side is a checkpoint, against the sweep that rounds on the fly and against whole models."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.artifacts import Bootstrap, Grid, Interval, Precision, StateScores
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.measure.scoring import fixed_state, score_states
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.bank_rules import check_bank
from quant_fairness_plugin.sweep.checkpoint_bank import bank_recipe, open_bank
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units, swept_units
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import ProcessExecutor
from quant_fairness_plugin.sweep.trials import score_plans_resumably
from quant_fairness_plugin.sweep.walk import score_plans
from tests.export import foreign_folders
from tests.export.build import GRID, TEXTS, quantize_tiny
from tests.planning import quantize_layers
from tests.planted_model import planted_texts
from tests.tiny import byte_tokenizer

Plans = Mapping[str, Mapping[str, Precision]]
LAYERS = 3
PLANS: dict[str, dict[str, Precision]] = {
    "none": {f"layers.{layer}": "int4" for layer in range(LAYERS)},
    "protect 0": {"layers.1": "int4", "layers.2": "int4"},
    "quantize 2": {"layers.2": "int4"},
}
TOLERANCE = 2e-5
"""Nats per sentence of some ten tokens: the dequantized weights are rounded to float16 in the one and not in the
other, or float32 additions are made in another order."""


def write(quantized: QuantizedModel, out: Path, **options: Any) -> Path:
    export(quantized, out, texts=TEXTS, reader="vllm", **options)
    return out


def awq(folder: Path, protected: Collection[int] = ()) -> QuantizedModel:
    calibration = build_calibration(byte_tokenizer(), TEXTS, row_tokens=8)
    grid = Grid(group_size=32, symmetric=False)
    return quantize_layers(load_model(str(folder)), tuple(protected), method="awq", grid=grid, calibration=calibration)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", layers=LAYERS, width=64)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(quantize_tiny(folder, protected=()), tmp_path_factory.mktemp("bank") / "rtn", format="gptq")


@pytest.fixture(scope="module")
def folded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(awq(folder), tmp_path_factory.mktemp("bank") / "awq", format="awq")


def banked(loaded: LoadedModel, folder: Path, grid: Grid = GRID, plans: Plans = PLANS) -> dict[str, StateScores]:
    units = map_units(loaded)
    return score_plans(loaded, plans, TEXTS, units=units, bank=open_bank(loaded, units, folder=folder, grid=grid))


def assert_close(found: StateScores, expected: StateScores) -> None:
    for language, row in expected.languages.items():
        np.testing.assert_allclose(found.languages[language].nll_nats, row.nll_nats, atol=TOLERANCE)
        np.testing.assert_allclose(found.languages[language].kl_nats, row.kl_nats, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "form"), [("llama", "gptq"), ("llama", "compressed-tensors"), ("gpt2", "gptq")])
def test_a_bank_of_a_rounded_checkpoint_is_rounding_on_the_fly(
    family: str, form: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(family, layers=LAYERS, width=64)
    own = load_model(str(folder))
    out = write(quantize_tiny(folder, protected=()), tmp_path / "out", format=form)
    expected = score_plans(own, PLANS, TEXTS, units=map_units(own), bank=RtnBank(own, map_units(own), GRID))
    for name, scores in banked(own, out).items():
        assert_close(scores, expected[name])
    assert max(expected["none"].languages["en"].kl_nats) > 100 * TOLERANCE


def test_folded_layers_are_exchanged_with_all_that_is_folded(loaded: LoadedModel, folded: Path) -> None:
    """`none` is the checkpoint itself; a layer that is put back to 16 bit takes its own norms and scales along."""
    found = banked(loaded, folded, grid=Grid(group_size=32, symmetric=False))
    dense = load_dense_model(folded)
    mixed = copy.deepcopy(dense)
    mixed.model.layers[0] = copy.deepcopy(loaded.model.model.layers[0])
    states = [fixed_state("16 bit", loaded.model), fixed_state("none", dense), fixed_state("protect 0", mixed)]
    expected = score_states(states, loaded.tokenizer, TEXTS)
    for name in ("none", "protect 0"):
        assert_close(found[name], expected[name])
    norm = "input_layernorm.weight"
    assert not torch.equal(dense.model.layers[0].get_parameter(norm), mixed.model.layers[0].get_parameter(norm))


def test_units_of_a_folded_layer_cannot_be_exchanged_alone(loaded: LoadedModel, folded: Path) -> None:
    units = map_units(loaded)
    bank = open_bank(loaded, units, folder=folded, grid=Grid(group_size=32, symmetric=False))
    assert bank.folds
    with pytest.raises(ConfigError, match="only whole layers can be exchanged"):
        swept_units(units, bank, "unit", "int4")


def test_what_the_checkpoint_protects_stays_and_is_said(
    folder: Path, loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write(quantize_tiny(folder, protected=(0,), overrides={"layers.2.down": "fp16"}), tmp_path / "out")
    units = map_units(loaded)
    bank = open_bank(loaded, units, folder=out, grid=GRID)
    assert bank.description.endswith("16 bit: 0, 2.down")
    assert "in 16 bit in every plan, as in the checkpoint: 0, 2.down" in caplog.text
    assert bank.weights("layers.0.qkv", "int4") == {}
    assert len(swept_units(units, bank, "layer", "int4")) == LAYERS
    singled = swept_units(units, bank, "unit", "int4")
    assert not any(name.startswith("layers.0.") or name == "layers.2.down" for name in singled)
    assert "layers.1.down" in singled


def test_the_description_tells_checkpoints_apart(folder: Path, loaded: LoadedModel, checkpoint: Path) -> None:
    units = map_units(loaded)
    first = open_bank(loaded, units, folder=checkpoint, grid=GRID).description
    tensors = load_file(checkpoint / "model.safetensors")
    copied = checkpoint.with_name("altered")
    shutil.copytree(checkpoint, copied)
    name = next(name for name in tensors if name.endswith("scales"))
    save_file(tensors | {name: 2 * tensors[name]}, copied / "model.safetensors", metadata={"format": "pt"})
    assert open_bank(loaded, units, folder=copied, grid=GRID).description != first


def test_workers_make_the_same_bank(loaded: LoadedModel, checkpoint: Path) -> None:
    units = map_units(loaded)
    bank = open_bank(loaded, units, folder=checkpoint, grid=GRID)
    here, there = (
        score_plans_resumably(loaded, PLANS, TEXTS, units=units, bank=bank, execution=Execution(executor=executor))
        for executor in (None, ProcessExecutor(1))
    )
    assert there == here


def test_a_sweep_over_a_bank_ranks_as_the_sweep_that_rounds(planted_model: Path, tmp_path: Path) -> None:
    own, texts = load_model(str(planted_model)), planted_texts().part("search")
    out = write(quantize_tiny(planted_model, protected=()), tmp_path / "out")
    config, draws = SweepConfig(top=1), Bootstrap(draws=200)
    rounded = sweep_units(own, texts, config, grid=GRID, bootstrap=draws)
    banked = sweep_units(own, texts, config, grid=GRID, bootstrap=draws, bank_recipe=bank_recipe(out, GRID))
    for row, other in zip(rounded.rows, banked.rows, strict=True):
        worst, found = row.objectives["worst"], other.objectives["worst"]
        assert isinstance(worst, Interval)
        assert isinstance(found, Interval)
        assert found.estimate == pytest.approx(worst.estimate, rel=1e-2, abs=1e-5)
    assert rounded.rankings["protect-one worst"].units == banked.rankings["protect-one worst"].units  # type: ignore[union-attr]
    assert banked.provenance.arguments["bank"].startswith("checkpoint compressed-tensors sha256 ")


@pytest.mark.parametrize("tool", ["gptqmodel", "autogptq", "autoawq"])
def test_checkpoints_of_other_tools_are_banks(tool: str, folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    form: Any = "awq" if tool == "autoawq" else "gptq"
    grid = Grid(group_size=32, symmetric=form == "gptq")
    out = write(quantize_tiny(folder, protected=(1,), grid=grid), tmp_path / "out", format=form)
    expected = banked(loaded, out, grid)
    getattr(foreign_folders, tool)(out)
    found = banked(loaded, out, grid)
    for name, scores in expected.items():
        assert_close(found[name], scores)


@pytest.mark.parametrize(
    ("grid", "advice"),
    [
        (Grid(group_size=64), "Pass --bits 4 --group-size 32 --sym"),
        (Grid(bits=3, group_size=32), "the sweep's is int3"),
        (Grid(group_size=32, symmetric=False), "Pass --bits 4 --group-size 32 --sym"),
    ],
)
def test_another_grid_is_refused(grid: Grid, advice: str, loaded: LoadedModel, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_bank(checkpoint, loaded.files, grid)


def test_the_clipping_rule_of_the_sweep_does_not_matter(loaded: LoadedModel, checkpoint: Path) -> None:
    check_bank(checkpoint, loaded.files, Grid(group_size=32, clip="mse"))


def test_another_model_is_refused(checkpoint: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    longer = load_model(str(tiny_model("llama", layers=2, width=64))).files
    with pytest.raises(ConfigError, match="num_hidden_layers is 3, that of llama-2-64-float16 2"):
        check_bank(checkpoint, longer, GRID)
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama", layers=LAYERS, width=64), other)
    tensors = load_file(other / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: 2 * tensors[name]}, other / "model.safetensors", metadata={"format": "pt"})
    altered = load_model(str(other))
    with pytest.raises(ConfigError, match="it was made from .* with sha256"):
        check_bank(checkpoint, altered.files, GRID)
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    foreign_folders.gptqmodel(foreign)
    check_bank(foreign, altered.files, GRID)  # nothing on paper gives it away
    with pytest.raises(ConfigError, match="model.embed_tokens.weight has other values"):
        open_bank(altered, map_units(altered), folder=foreign, grid=GRID)


def test_other_shapes_are_refused(checkpoint: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    foreign_folders.gptqmodel(foreign)
    wider = load_model(str(tiny_model("llama", layers=LAYERS, width=128))).files
    with pytest.raises(ConfigError, match=r"is \[264, 64\], in llama-3-128-float16 \[264, 128\]|is \[64\], in"):
        check_bank(foreign, wider, GRID)


def test_a_16_bit_model_is_no_bank(loaded: LoadedModel, folder: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        check_bank(folder, loaded.files, GRID)


def test_no_folder_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        check_bank(tmp_path / "absent", loaded.files, GRID)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_a_bank_may_hold_several_group_sizes(tiny_model: Callable[..., Path], tmp_path: Path, format: str) -> None:
    """Of width 96: `down` has groups of 64, all else groups of 32."""
    source, grid = tiny_model("llama", layers=LAYERS, width=96), Grid(group_size=64)
    folder = write(quantize_tiny(source, protected=(), grid=grid), tmp_path / "bank", format=format)
    model = load_model(str(source))
    units = map_units(model)
    bank, rounding = open_bank(model, units, folder=folder, grid=grid), RtnBank(model, units, grid)
    for unit in units.group_names():
        for name, value in rounding.weights(unit, "int4").items():
            # The one rounds what it has dequantized to float16, half a unit in the last of eleven places.
            assert torch.allclose(bank.weights(unit, "int4")[name], value, rtol=2**-11, atol=0), name
    with pytest.raises(ConfigError, match="groups of 64, symmetric, the sweep's is int4, groups of 32"):
        check_bank(folder, model.files, GRID)


def test_several_widths_are_refused(folder: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    out = write(quantize_tiny(folder, protected=(), overrides={"layers.1": "int8"}), tmp_path / "out", format="gptq")
    with pytest.raises(UnsupportedModelError, match="2 grids"):
        check_bank(out, loaded.files, GRID)


def test_metadata_without_a_grid_is_an_error(loaded: LoadedModel, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]["bits"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ArtifactError, match="does not say its grid"):
        check_bank(out, loaded.files, GRID)


def test_another_precision_than_the_checkpoints_is_refused(loaded: LoadedModel, checkpoint: Path) -> None:
    bank = open_bank(loaded, map_units(loaded), folder=checkpoint, grid=GRID)
    with pytest.raises(ConfigError, match="holds int4 weights, and layers.0.down is to be in int8"):
        bank.weights("layers.0.down", "int8")


def test_a_bank_and_a_memory_budget_are_refused(loaded: LoadedModel, checkpoint: Path) -> None:
    budget = Execution(memory_budget=10**9)
    with pytest.raises(ConfigError, match="do not go together"):
        sweep_units(loaded, TEXTS, grid=GRID, bank_recipe=bank_recipe(checkpoint, GRID), execution=budget)
