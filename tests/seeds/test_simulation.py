from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.errors import ConfigError, InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds import fair_quantize, quantize_except
from quant_fairness_plugin.seeds.simulation import (
    is_simulated,
    original_weights,
    protect_layers,
    simulate_int4,
    undo_simulation,
)

Load = Callable[..., LoadedModel]
FAMILIES = ("gpt2", "opt", "llama")


def round_tensor(weight: Tensor, largest: int = 7) -> Tensor:
    """Value by value with Python's own `round`, which also takes ties to even."""
    scale = weight.abs().max() / largest
    levels = [min(largest, max(-largest - 1, round(float(v)))) for v in (weight / scale).flatten()]
    return torch.tensor(levels, dtype=weight.dtype).view(weight.shape) * scale


def naive_q1(weights: dict[str, Tensor], layers: set[int]) -> dict[str, Tensor]:
    """As the package of the seeds does it."""
    kept = re.compile("|".join(rf"h\.{i}\.|layers\.{i}\." for i in layers) or r"(?!)")
    return {
        name: weight if "bias" in name or "ln_f" in name or kept.search(name) or "weight" not in name
        else round_tensor(weight)
        for name, weight in weights.items()
    }  # fmt: skip


def naive_q2(weights: dict[str, Tensor], layers: set[int], largest: int) -> dict[str, Tensor]:
    """As the GPU experiments of the seeds do it."""
    pattern = "layers."
    for name in weights:
        if "model.layers." in name or "h." in name:
            pattern = "model.layers." if "model.layers." in name else "h."
            break
    result = {}
    for name, weight in weights.items():
        skipped = "bias" in name or any(word in name.lower() for word in ("ln", "layernorm", "norm"))
        skipped = skipped or any(f"{pattern}{i}." in name for i in layers) or "weight" not in name
        result[name] = weight if skipped else round_tensor(weight, largest)
    return result


def naive_q3(weights: dict[str, Tensor], layers: set[int]) -> dict[str, Tensor]:
    """As the experiments behind the published figures do it."""
    result = dict(weights)
    for name in weights:
        block = re.search(r"(?:h|layers)\.(\d+)\.", name)
        if name.endswith("weight") and not (block and int(block[1]) in layers):
            result[name] = round_tensor(weights[name])
    return result


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(model: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    actual = parameters(model)
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in parameters(model).items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [set(), {0}, {1, 11}])
def test_q1_is_bit_equal_to_the_naive_one(load: Load, family: str, layers: set[int]) -> None:
    model = load(family, layers=12, width=8).model
    before = parameters(model)
    simulate_int4(model, protect_layers=layers)
    assert_equal(model, naive_q1(before, layers))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layers", "bits"), [(set(), 4), ({0}, 4), ({1, 11}, 3)])
def test_q2_is_bit_equal_to_the_naive_one(load: Load, family: str, layers: set[int], bits: int) -> None:
    model = load(family, layers=12, width=8).model
    before = parameters(model)
    simulate_int4(model, exclude=layers, bits=bits)
    assert_equal(model, naive_q2(before, layers, 2 ** (bits - 1) - 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [set(), {0}, {1, 11}])
def test_q3_is_bit_equal_to_the_naive_one(load: Load, family: str, layers: set[int]) -> None:
    model = load(family, layers=12, width=8).model
    before = parameters(model)
    simulate_int4(model, layers, variant="Q3")
    assert_equal(model, naive_q3(before, layers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_rounded_in_their_own_arithmetic(load: Load, dtype: torch.dtype) -> None:
    model = load("gpt2").model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    before = parameters(model)
    simulate_int4(model, {0})
    assert_equal(model, naive_q1(before, {0}))


def test_what_the_variants_take_differs_as_described(load: Load) -> None:
    taken = {}
    for variant, arguments in {"Q1": {}, "Q2": {"exclude": ()}, "Q3": {"variant": "Q3"}}.items():
        model = load("gpt2").model
        before = parameters(model)
        simulate_int4(model, **arguments)  # type: ignore[arg-type]
        taken[variant] = changed(model, before)
    assert taken["Q3"] - taken["Q1"] == {"transformer.ln_f.weight"}
    assert "transformer.h.0.ln_1.weight" in taken["Q1"] - taken["Q2"]
    assert "transformer.wte.weight" in taken["Q2"]  # the embedding, and with it the tied head
    assert not any("bias" in name for names in taken.values() for name in names)


def test_exclude_protects_nothing_in_gpt_neox(load: Load) -> None:
    model = load("gpt_neox").model
    before = parameters(model)
    simulate_int4(model, exclude={0})  # "dense_h_to_4h." passes for the pattern "h."
    assert "gpt_neox.layers.0.mlp.dense_h_to_4h.weight" in changed(model, before)


def test_tensors_of_zeros_stay_as_they_are(load: Load) -> None:
    model = load("gpt2").model
    with torch.no_grad():
        model.get_parameter("transformer.wpe.weight").zero_()
    simulate_int4(model)
    assert (model.get_parameter("transformer.wpe.weight") == 0).all()


@pytest.mark.parametrize(("family", "norm"), [("gpt2", "transformer.ln_f"), ("llama", "model.norm")])
def test_the_final_norm_can_be_protected_in_every_family_or_taken(load: Load, family: str, norm: str) -> None:
    def taken(**arguments: Any) -> set[str]:
        model = load(family).model
        before = parameters(model)
        simulate_int4(model, **arguments)
        return changed(model, before)

    name = f"{norm}.weight"
    assert taken(protect_final_ln=False) - taken(protect_final_ln=True) == {name}
    assert taken(variant="Q3") - taken(variant="Q3", protect_final_ln=True) == {name}
    assert (name in taken()) == (family == "llama")  # the seeds' rule knows only `ln_f`


def test_protect_biases_false_takes_no_bias_and_says_so(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    model = load("gpt2").model
    before = parameters(model)
    simulate_int4(model, protect_biases=False)
    assert_equal(model, naive_q1(before, set()))
    assert "protect_biases=False changes nothing" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_gives_back_every_bit_also_after_several_simulations(load: Load, family: str) -> None:
    model = load(family).model
    before = parameters(model)
    assert not is_simulated(model)
    simulate_int4(model, {0})
    simulate_int4(model, exclude=())
    simulate_int4(model, variant="Q3")
    assert is_simulated(model)
    undo_simulation(model)
    assert_equal(model, before)
    assert not is_simulated(model)
    with pytest.raises(ConfigError, match="carries no original weights.*simulate_int4"):
        undo_simulation(model)


def test_original_weights_come_back_for_a_while(load: Load) -> None:
    model = load("gpt2").model
    before = parameters(model)
    simulate_int4(model, {0})
    simulated = parameters(model)
    with pytest.raises(KeyboardInterrupt), original_weights(model):  # noqa: PT012 # the state inside is the point
        assert_equal(model, before)
        raise KeyboardInterrupt
    assert_equal(model, simulated)
    undo_simulation(model)
    with pytest.raises(ConfigError, match="carries no original weights"), original_weights(model):
        pass


def test_the_way_back_is_on_the_cpu_not_in_the_checkpoint_and_survives_a_copy(load: Load, tmp_path: Path) -> None:
    model = load("gpt2").model
    before = parameters(model)
    names = set(model.state_dict())
    simulate_int4(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    undo_simulation(twin)
    assert_equal(twin, before)
    assert is_simulated(model)


def test_registered_layers_are_left_alone_by_every_variant(load: Load) -> None:
    calls: tuple[dict[str, Any], ...] = ({}, {"exclude": {1}}, {"variant": "Q3"})
    for arguments in calls:
        model = load("gpt2", layers=3).model
        before = parameters(model)
        assert protect_layers(model, [2, 0]) == (0, 2)
        simulate_int4(model, **arguments)
        taken = changed(model, before)
        assert not any("h.0." in name or "h.2." in name for name in taken)
        assert any("h.1." in name for name in taken) == ("exclude" not in arguments)


def test_an_empty_registration_replaces_an_earlier_one(load: Load) -> None:
    model = load("gpt2").model
    before = parameters(model)
    protect_layers(model, [0])
    protect_layers(model, [])
    simulate_int4(model)
    assert_equal(model, naive_q1(before, set()))


@pytest.mark.parametrize("layer", [2, -1, True, "0"])
def test_layers_that_the_model_lacks_are_errors(load: Load, layer: Any) -> None:
    model = load("gpt2").model
    before = parameters(model)
    for call in (
        lambda: simulate_int4(model, [layer]),
        lambda: simulate_int4(model, exclude=[layer]),
        lambda: protect_layers(model, [layer]),
    ):
        with pytest.raises(InvalidLayerError, match="does not exist; the model has layers 0 to 1"):
            call()
    assert_equal(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protect_layers": {0}, "exclude": {0}}, "cannot be used together"),
        ({"variant": "Q9"}, "variant 'Q9' cannot be used"),
        ({"variant": "Q2", "protect_layers": {0}}, "protect_layers does not go with variant Q2.*in exclude"),
        ({"variant": "Q3", "exclude": {0}}, "exclude does not go with variant Q3.*in protect_layers"),
        ({"bits": 3.5}, r"bits 3\.5 cannot be used"),
        ({"bits": 1}, "bits 1 cannot be used"),
        ({"bits": 9}, "bits 9 cannot be used"),
        ({"exclude": (), "protect_final_ln": False}, "protect_final_ln=False has no effect with exclude="),
    ],
)
def test_arguments_that_do_not_go_together_are_errors(load: Load, arguments: dict[str, Any], message: str) -> None:
    model = load("gpt2").model
    before = parameters(model)
    with pytest.raises(ConfigError, match=message):
        simulate_int4(model, **arguments)
    assert_equal(model, before)


def weights_after(load: Load, family: str = "gpt2", **settings: Any) -> dict[str, Tensor]:
    model = load(family, layers=3).model
    simulate_int4(model, **settings)
    return dict(model.named_parameters())


def test_the_settings_of_the_seeds_documents_are_accepted(load: Load) -> None:
    documented = {"protect_biases": True, "protect_final_ln": True, "quantize_rest_to": "INT4"}
    ours = weights_after(load, protect_layers=[0, 2], **documented)
    plain = weights_after(load, protect_layers=[0, 2])  # in GPT-2, what they say is the default
    assert all(torch.equal(value, ours[name]) for name, value in plain.items())
    other = load("gpt2", layers=3).model
    quantize_except(other, [0, 2], **documented)  # type: ignore[arg-type] # a dict of three types
    excluded = weights_after(load, exclude=[0, 2])
    assert all(torch.equal(value, excluded[name]) for name, value in other.named_parameters())
    fair = load("gpt2", layers=3).model
    assert fair_quantize(fair, **documented) == (0, 2)  # type: ignore[arg-type]
    assert all(torch.equal(value, excluded[name]) for name, value in fair.named_parameters())


@pytest.mark.parametrize("name", ["INT8", "int8"])
def test_the_width_can_be_given_by_its_name(load: Load, name: str) -> None:
    ours, bits = weights_after(load, quantize_rest_to=name), weights_after(load, bits=8)
    int4 = weights_after(load)
    assert all(torch.equal(value, ours[key]) for key, value in bits.items())
    assert not all(torch.equal(value, ours[key]) for key, value in int4.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantize_rest_to": "FP8"}, "quantize_rest_to 'FP8' cannot be simulated: .*INT2 to INT8"),
        ({"quantize_rest_to": "INT16"}, "quantize_rest_to 'INT16' cannot be simulated"),
        ({"quantize_rest_to": "NF4"}, "quantize_rest_to 'NF4' cannot be simulated"),
        ({"quantize_rest_to": 4}, "quantize_rest_to 4 cannot be simulated"),
        ({"quantize_rest_to": "INT8", "bits": 4}, "bits 4 contradicts quantize_rest_to 'INT8'"),
    ],
)
def test_another_width_is_refused_with_the_reason(load: Load, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        weights_after(load, **settings)


def test_what_a_call_cannot_do_is_refused_before_the_model_is_changed(load: Load) -> None:
    model = load("gpt2", layers=3).model
    with pytest.raises(ConfigError, match="protect_biases=False cannot be done: .*quantizes no bias"):
        quantize_except(model, [0], protect_biases=False)
    with pytest.raises(ConfigError, match="protect_biases=False cannot be done"):
        fair_quantize(model, protect_biases=False)
    with pytest.raises(ConfigError, match="protect_final_ln=False has no effect with exclude="):
        fair_quantize(model, protect_final_ln=False)
    assert not is_simulated(model)


def test_an_unknown_final_norm_cannot_be_protected(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("gpt2", layers=3).model
    known = detect_family(model)
    unknown = replace(known, name="generic", architecture=replace(known.architecture, final_norm=None))
    monkeypatch.setattr("quant_fairness_plugin.seeds.simulation.detect_family", lambda _: unknown)
    with pytest.raises(UnsupportedModelError, match="final norm of this generic architecture is not known"):
        simulate_int4(model, protect_final_ln=True)
    assert not is_simulated(model)
