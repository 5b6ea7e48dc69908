"""One-line rules against sets of names written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds.rules import read_rule, scaled_layer
from quant_fairness_plugin.seeds.simulation import simulate, undo_simulation
from tests.seeds.test_simulation import assert_equal, naive_q3, parameters, round_tensor

Load = Callable[..., LoadedModel]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("Q3", ()),
        ("Q3: 0 11", (".h.0.", ".h.11.")),
        ("Q3: odd", tuple(f".h.{layer}." for layer in range(1, 12, 2))),
        ("Q3: attention", (".attn.",)),
        ("Q3: mlp", (".mlp.",)),
        ("Q3: 0.mlp", (".h.0.mlp.",)),
        ("Q3: tokens", (".wte.",)),
        ("Q3: positions", (".wpe.",)),
        ("Q3: norms", (".ln_",)),
    ],
)
def test_a_rule_leaves_alone_what_it_names(load: Load, rule: str, kept: tuple[str, ...]) -> None:
    model = load("gpt2", layers=12, width=8).model
    before = parameters(model)
    simulate(model, read_rule(rule, model).rule)
    rounded = naive_q3(before, set())
    assert_equal(model, {n: before[n] if any(part in n for part in kept) else rounded[n] for n in before})


def test_bits_follow_an_item_and_biases_are_taken_by_q4_alone(load: Load) -> None:
    model = load("gpt2", layers=12, width=8).model
    before = parameters(model)
    simulate(model, read_rule("Q3 int3: 9@8", model).rule)
    name, other = "transformer.h.9.mlp.c_fc.weight", "transformer.h.8.mlp.c_fc.weight"
    assert torch.equal(model.get_parameter(name), round_tensor(before[name], 127))
    assert torch.equal(model.get_parameter(other), round_tensor(before[other], 3))
    undo_simulation(model)
    rule, without = read_rule("Q4", model).rule, read_rule("Q4: biases", model).rule
    biases = {name for name in before if name.endswith(".bias")}
    assert {name for name in before if rule(name) != without(name)} == biases


def test_the_largest_weights_stay_as_they_are(load: Load) -> None:
    model = load("gpt2", layers=3, width=8).model
    before = parameters(model)
    recipe = read_rule("Q3: largest=5%", model)
    simulate(model, recipe.rule, keep_largest=recipe.keep_largest)
    taken = [name for name in before if "weight" in name]
    ordered = sorted((float(value) for name in taken for value in before[name].abs().flatten()), reverse=True)
    limit = ordered[round(0.05 * len(ordered)) - 1]
    for name in taken:
        expected = torch.where(before[name].abs() >= limit, before[name], round_tensor(before[name]))
        assert torch.equal(model.get_parameter(name), expected), name


def test_whole_tensors_are_kept_at_random_by_magnitude_or_by_variance(load: Load) -> None:
    model = load("gpt2", layers=12, width=8).model
    before = parameters(model)
    with torch.no_grad():
        model.get_parameter("transformer.h.5.mlp.c_fc.weight").mul_(1e3)
    names = [name for name in before if "weight" in name]
    drawn = {seed: {n for n in names if read_rule(f"Q3: random=50%/{seed}", model).rule(n) is None} for seed in (1, 2)}
    assert drawn[1] != drawn[2]
    two_layers = 2 * sum(before[name].numel() for name in before if ".h.0." in name)
    sizes = [before[name].numel() for name in drawn[1]]
    assert two_layers <= sum(sizes) < two_layers + max(value.numel() for value in before.values())
    largest = read_rule("Q3: magnitude=0.01%", model).rule
    assert [name for name in names if largest(name) is None] == ["transformer.h.5.mlp.c_fc.weight"]
    varied = read_rule("Q3: variance=1", model).rule
    assert {name for name in names if varied(name) is None} == {name for name in names if ".h.5." in name}


def test_layers_are_those_of_gpt2_at_the_same_depth(load: Load) -> None:
    assert [scaled_layer(layer, 30) for layer in (0, 9, 11)] == [0, 24, 29]
    model = load("llama", layers=3).model
    rule = read_rule("Q3: 11", model).rule
    kept = [name for name, _ in model.named_parameters() if "weight" in name and rule(name) is None]
    assert kept
    assert all("layers.2." in name for name in kept)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("Q9", "'Q9' is no rule; write 'Q3'"),
        ("Q3 int9", "is no rule"),
        ("Q3: 12", "layer 12: rules number the layers of GPT-2, 0 to 11"),
        ("Q3: heads", "'heads' names no part of a model; use a layer, or one of attention"),
        ("Q3: 0-3", "'0-3' names no part of a model; write 0"),
    ],
)
def test_text_that_is_no_rule_is_refused(load: Load, rule: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rule(rule, load("gpt2").model)


def test_a_share_or_width_that_is_none_is_refused_before_the_model_changes(load: Load) -> None:
    model = load("gpt2").model
    before = parameters(model)
    with pytest.raises(ConfigError, match="keep_largest 2 is no share"):
        simulate(model, lambda _: 4, keep_largest=2)
    with pytest.raises(ConfigError, match="bits 16 cannot be used"):
        simulate(model, lambda _: 16)
    assert_equal(model, before)
