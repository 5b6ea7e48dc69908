"""Interventions against what they stand for: patched states, removed blocks, zeroed heads, sorted weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant_fairness_plugin.analysis import variants
from quant_fairness_plugin.analysis.changes import CHANGES, prefix_name
from quant_fairness_plugin.analysis.interventions import Interventions, analyse, check_silence
from quant_fairness_plugin.analysis.quantized import rounded_state
from quant_fairness_plugin.artifacts import Grid, Interval, Unit
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.plans.units import map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from tests.analysis.samples import SENTENCES, few_texts, request_of

Load = Callable[..., LoadedModel]
LAYERS = 3
GRID = Grid(group_size=32, clip="mse")


def ask(loaded: LoadedModel, *kinds: str) -> Interventions:
    return analyse(request_of(loaded, options={"kinds": kinds}))


def log_probabilities(loaded: LoadedModel, text: str) -> Tensor:
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        return loaded.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def divergence(expected: Tensor, other: Tensor) -> float:
    return float((expected.exp() * (expected - other)).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_16_bit_up_to_a_layer_is_patching_its_states(load: Load, family: str) -> None:
    loaded = load(family, layers=LAYERS)
    scores = ask(loaded, "prefix").scores
    state = rounded_state(loaded, GRID)
    for layer in range(LAYERS - 1):
        for number, text in enumerate(SENTENCES["he"]):
            kept: list[Any] = []
            handle = loaded.block(layer).register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
            expected = log_probabilities(loaded, text)
            handle.remove()
            handle = loaded.block(layer).register_forward_hook(lambda _, __, ___, kept=kept: kept[0])
            with state.applied():
                patched = log_probabilities(loaded, text)
            handle.remove()
            found = scores[prefix_name(layer + 1)].languages["he"].kl_nats[number]
            assert found == pytest.approx(divergence(expected, patched), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_dropped_layer_is_a_block_taken_out(load: Load, family: str) -> None:
    loaded = load(family, layers=LAYERS)
    scores = ask(loaded, "drop").scores
    whole = {text: log_probabilities(loaded, text) for text in SENTENCES["en"]}
    parent, _, name = loaded.family.blocks.rpartition(".")
    holder, blocks = loaded.model.get_submodule(parent), loaded.model.get_submodule(loaded.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    setattr(holder, name, nn.ModuleList([blocks[0], blocks[2]]))
    try:
        for config in {id(c): c for c in (loaded.model.config, holder.config)}.values():
            config.num_hidden_layers = LAYERS - 1
        for number, (text, expected) in enumerate(whole.items()):
            found = scores["without layer 1"].languages["en"].kl_nats[number]
            assert found == pytest.approx(divergence(expected, log_probabilities(loaded, text)), abs=1e-5)
    finally:
        setattr(holder, name, blocks)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_only_head_that_is_read_is_the_only_one_that_matters(load: Load, family: str) -> None:
    loaded = load(family, layers=2)
    attention, _ = variants.writers(loaded.family, 1)
    weight = loaded.model.get_parameter(f"{loaded.family.blocks}.1.{attention.modules[0]}.weight").data
    inputs = weight.t() if not loaded.family.conv1d else weight  # [inputs, outputs]
    width = len(inputs) // 4
    inputs[: 2 * width] = 0
    inputs[3 * width :] = 0
    result = ask(loaded, "heads")
    lost = {name: sum(state.languages["en"].kl_nats) for name, state in result.scores.items() if "head 1." in name}
    assert [name for name, kl in lost.items() if kl > 0] == ["without head 1.2"]


def test_a_layer_that_changes_what_it_is_given_anyway_is_refused(load: Load) -> None:
    loaded = load("llama", layers=2)
    units = map_units(loaded)
    check_silence(loaded, units)
    handle = loaded.block(1).register_forward_hook(lambda _, __, output: output * 2)
    try:
        with pytest.raises(UnsupportedModelError, match="adds nothing still changes its input"):
            check_silence(loaded, units)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruning_and_keeping_are_those_of_sorted_weights(load: Load, family: str) -> None:
    loaded = load(family, layers=2)
    units = map_units(loaded)
    names = [name for unit in units.group_names() for name in units.parameters[unit]]
    original = {name: loaded.model.get_parameter(name).detach() for name in names}
    sizes = np.sort(np.concatenate([value.abs().numpy().ravel() for value in original.values()]))
    limit = float(sizes[round(0.7 * len(sizes))])

    def changed(make: variants.Make) -> dict[str, Tensor]:
        return {name: value for unit in units.group_names() for name, value in make(unit).items()}

    pruned = changed(variants.prune_globally(loaded, units, 0.7))
    rounded = changed(lambda unit: RtnBank(loaded, units, GRID).weights(unit, "int4"))
    kept = changed(variants.keep_largest(loaded, units, GRID, 0.3))
    for name, value in original.items():
        assert torch.equal(pruned[name], value * (value.abs() >= limit))
        assert torch.equal(kept[name], torch.where(value.abs() >= limit, value, rounded[name]))
    each = changed(variants.prune_each(loaded, units, 0.5))
    assert all(float((value == 0).float().mean()) == pytest.approx(0.5, abs=0.01) for value in each.values())
    sparse = changed(variants.prune_n_of_m(loaded, units, 2, 4))
    for name, value in sparse.items():
        groups, before = ((v.t() if loaded.family.conv1d else v).reshape(-1, 4) for v in (value, original[name]))
        assert ((groups == 0).sum(1) >= 2).all()  # a weight can be 0 by itself
        assert torch.equal(groups.abs().amax(1), before.abs().amax(1))


def test_every_kind_is_scored_and_what_follows_is_there(load: Load) -> None:
    loaded = load("llama", layers=2)
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    result = ask(loaded, *CHANGES)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.named_parameters())
    assert {row.kind for row in result.plans} == set(CHANGES)
    assert len(result.languages) == 2 * len(result.plans)
    assert {row.language for row in result.rate} <= {"en", "he"}
    whole = sum(result.scores["all rounded"].languages["en"].kl_nats)
    same = sum(result.scores["int4"].languages["en"].kl_nats)
    assert whole == pytest.approx(same, abs=1e-4)
    patterns = [row.plan for row in result.plans if row.kind == "patterns"]
    assert patterns == ["attention rounded", "MLP rounded", "even layers rounded", "odd layers rounded"]


def test_an_unknown_kind_is_named(load: Load) -> None:
    with pytest.raises(ConfigError, match="--kind 'probe' is unknown"):
        ask(load("llama"), "probe")


def test_heads_are_those_of_the_output_module(load: Load) -> None:
    loaded = load("llama", layers=1)
    made = variants.without_head(loaded, map_units(loaded), 3)(str(Unit(0, "o")))
    [value] = made.values()
    [name] = made
    width = value.shape[1] // 4
    original = loaded.model.get_parameter(name)
    assert not value[:, 3 * width :].any()
    assert torch.equal(value[:, : 3 * width], original[:, : 3 * width])


def test_intervals_are_of_resampled_sentences(load: Load) -> None:
    result = ask(load("llama", layers=2), "bits")
    row = next(row for row in result.languages if row.plan == "int2")
    assert isinstance(row.kl, Interval)
    assert row.kl.low < row.kl.estimate < row.kl.high
    assert len(few_texts()) == 3


def test_the_heads_of_a_layer_are_averaged(load: Load) -> None:
    answer = ask(load("llama", layers=LAYERS), "heads")
    assert [row.layer for row in answer.head_layers] == list(range(LAYERS))
    for row in answer.head_layers:
        plans = [plan for plan in answer.scores if plan.startswith(f"without head {row.layer}.")]
        states = [answer.scores[plan].languages[name] for plan in plans for name in SENTENCES]
        values = [sum(state.kl_nats) / sum(state.bytes_) / np.log(2) for state in states]
        assert row.heads == len(plans)
        if isinstance(row.mean_kl, Interval):  # a random model may know a language or not
            assert row.mean_kl.estimate == pytest.approx(np.mean(values), rel=1e-5)
