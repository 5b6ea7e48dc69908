"""The state tree against the plain evaluation of every plan by itself, on every family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, Precision, StateScores, TextSet, bits_of_precision
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state, score_states
from quant_fairness_plugin.model.linear import is_conv1d
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.quantize.grid import quantize_rtn
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.walk import plan_tree, score_plans
from tests.planted_model import planted_texts
from tests.tiny import FAMILIES, byte_tokenizer
from tests.traced import traced_model

Build = Callable[..., Path]
GRID = Grid(group_size=32)
LAYERS = 3
Plan = Mapping[str, Precision]
TOLERANCE = 1e-5
"""Nats per token: the difference that float32 additions in another order can make over three blocks."""


def texts() -> TextSet:
    return planted_texts().part("search")


def plans(extra: Mapping[str, Plan]) -> dict[str, Plan]:
    everything: Plan = {f"layers.{i}": "int3" for i in range(LAYERS)}
    single = {f"protect {i}": {k: v for k, v in everything.items() if k != f"layers.{i}"} for i in range(LAYERS)}
    mixed: Plan = {"layers.0": "int8", "layers.1": "int2"}
    return {"none": everything, **single, "mixed": mixed, **extra}


def applied_naively(loaded: LoadedModel, plan: Plan) -> dict[str, torch.Tensor]:
    """Every parameter that a plan changes, rounded one by one."""
    units, found = map_units(loaded), {}
    chosen = {unit: precision for unit, precision in units.expanded(plan).items() if precision != "fp16"}
    for unit, precision in chosen.items():
        for name in units.parameters[unit]:
            value = loaded.model.get_parameter(name)
            module = loaded.model.get_submodule(name.rpartition(".")[0])
            matrix = value.t() if is_conv1d(module) and value.dim() == 2 else value
            grid = Grid(bits=bits_of_precision(precision), group_size=GRID.group_size if value.dim() == 2 else -1)
            if value.dim() == 2 and matrix.shape[1] % GRID.group_size:
                continue
            rounded = quantize_rtn(matrix.reshape(-1, matrix.shape[-1]), grid, scale_dtype=loaded.storage_dtype)
            dense = rounded.dequantize().view(matrix.shape)
            found[name] = dense.t() if is_conv1d(module) and value.dim() == 2 else dense
    return found


def naive_scores(folder: Path, wanted: Mapping[str, Plan]) -> dict[str, StateScores]:
    """Every plan on a model of its own, untied, through whole forward passes."""
    states: list[ModelState] = [fixed_state("16 bit", load_model(str(folder)).model)]
    for name, plan in wanted.items():
        changed = load_model(str(folder))
        head = changed.model.get_submodule(changed.family.head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        values = applied_naively(load_model(str(folder)), plan)
        for parameter, value in values.items():
            changed.model.get_parameter(parameter).data.copy_(value)
        states.append(fixed_state(name, changed.model))
    return score_states(states, load_model(str(folder)).tokenizer, texts())


def assert_close(found: Mapping[str, StateScores], expected: Mapping[str, StateScores]) -> None:
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        for language, own in scores.languages.items():
            ours = found[name].languages[language]
            assert (ours.tokens, ours.bytes_) == (own.tokens, own.bytes_)
            for a, b, tokens in zip(
                ours.nll_nats + ours.kl_nats, own.nll_nats + own.kl_nats, own.tokens * 2, strict=True
            ):
                assert abs(a - b) <= TOLERANCE * tokens, (name, language)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_plan_equals_its_naive_evaluation(tiny_model: Build, family: str) -> None:
    folder = tiny_model(family, layers=LAYERS)
    loaded = load_model(str(folder))
    units = map_units(loaded)
    group = units.groups[-1]
    wanted = plans(
        {
            "one unit": {f"layers.1.{group}": "int3"},
            "all but a unit": {f"layers.{i}": "int3" for i in range(LAYERS)} | {f"layers.1.{group}": "fp16"},
            "around": {"embeddings": "int4", "final_norm": "int4", "layers.2.norms": "int4"},
            "head": {"head": "int3"},
        }
    )
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    found = score_plans(loaded, wanted, texts(), units=units, bank=RtnBank(loaded, units, GRID), batch_tokens=100)
    assert_close(found, naive_scores(folder, wanted))
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("architecture", ["cohere2", "gemma2", "granite"])
def test_what_follows_the_head_is_part_of_every_plan(tmp_path: Path, architecture: str) -> None:
    model = traced_model(architecture)
    # As strong as in no checkpoint, so that scores without them are far off: these models come with 0.0625, 30 and 1.
    model.config.update({"logit_scale": 0.05, "final_logit_softcapping": 0.5, "logits_scaling": 20.0})
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    units = map_units(loaded)
    wanted: dict[str, Plan] = {"a layer": {"layers.1": "int3"}, "head": {"head": "int3"}}
    bank = RtnBank(loaded, units, GRID)
    assert_close(score_plans(loaded, wanted, texts(), units=units, bank=bank), naive_scores(tmp_path, wanted))


def test_progress_counts_the_trees_block_passes(tiny_model: Build) -> None:
    loaded = load_model(str(tiny_model("llama", layers=LAYERS)))
    units = map_units(loaded)
    seen: list[tuple[int, int]] = []
    wanted = plans({})
    bank = RtnBank(loaded, units, GRID)
    score_plans(loaded, wanted, texts(), units=units, bank=bank, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1]
    assert seen[-1][1] % plan_tree(wanted, units).block_passes == 0


def test_biases_and_positions_are_units_where_a_model_has_them(tiny_model: Build) -> None:
    units = map_units(load_model(str(tiny_model("gpt2", layers=LAYERS))))
    assert units.stages[0] == ("embeddings", "positions")
    assert "transformer.h.1.mlp.c_fc.bias" in units.parameters["layers.1.biases"]
    assert "layers.1.biases" not in map_units(load_model(str(tiny_model("llama", layers=LAYERS)))).parameters


def test_a_plan_for_an_unknown_unit_is_refused(tiny_model: Build) -> None:
    units = map_units(load_model(str(tiny_model("llama", layers=LAYERS))))
    with pytest.raises(ConfigError, match=r"the model has no 'layers\.3'; use layers\.0 to layers\.2"):
        units.expanded({"layers.3": "int4"})
    with pytest.raises(ConfigError, match="a plan is named '16 bit'"):
        plan_tree({"16 bit": {}}, units)
