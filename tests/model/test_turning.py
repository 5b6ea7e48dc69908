"""Turned heads: the matrix, the model that computes the same, and which attentions can be turned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.model import tracing
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.tracing import trace_blocks, turns
from quant_fairness_plugin.model.turning import Turning, turning_matrix
from quant_fairness_plugin.quantize.turning import as_in_the_model, layer_turnings, turn_layer
from tests.traced import CONFIGS, traced_model

IDS = torch.arange(3, 33).reshape(2, 15)
SAME = 2e-6
"""Of the largest logit; float32 keeps seven digits."""
MOVED = 1e-2


@pytest.mark.parametrize("width", [1, 2, 7, 8, 24, 64, 80, 96])
def test_the_matrix_turns_and_spreads_every_channel(width: int) -> None:
    matrix = turning_matrix(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    even = width & -width
    # No channel keeps more of its square than an even share, but for twice that in the part that is no power of two.
    assert float(matrix.square().max()) <= (1 / even if even == width else 2 / width) + 1e-12


def test_heads_are_turned_as_a_loop_turns_them() -> None:
    generator = torch.Generator().manual_seed(1)
    heads, width, hidden, readers = 2, 6, 10, 4
    values, output = torch.nn.Linear(hidden, heads * width), torch.nn.Linear(readers * width, hidden)
    old = {name: value.detach().clone() for name, value in values.named_parameters()}
    read = output.weight.detach().clone()
    Turning("v", "o", width).apply({"v": values, "o": output})
    matrix = turning_matrix(width).float()
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        torch.testing.assert_close(values.weight[rows], matrix @ old["weight"][rows])
        torch.testing.assert_close(values.bias[rows], matrix @ old["bias"][rows])
    for head in range(readers):
        columns = slice(head * width, (head + 1) * width)
        torch.testing.assert_close(output.weight[:, columns], read[:, columns] @ matrix.T)
    mixed = torch.rand(readers, heads, generator=generator)  # what attention does: it mixes tokens, not channels
    given = torch.rand(hidden, generator=generator)
    before = read @ _attended(mixed, old["weight"] @ given + old["bias"], width)
    torch.testing.assert_close(output.weight @ _attended(mixed, values(given), width), before)
    turning = Turning("v", "o", width)
    torch.testing.assert_close(turning.undone("v", values.weight.detach()), old["weight"])
    torch.testing.assert_close(turning.undone("o", output.weight.detach()), read)


def _attended(mixed: Tensor, values: Tensor, width: int) -> Tensor:
    return (mixed @ values.view(-1, width)).flatten()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2", "qwen3", "opt"])
def test_a_turned_model_computes_the_same(family: str, tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model(family)), dtype=torch.float32)
    before, originals = _logits(loaded.model), {}
    for layer in range(loaded.layers):
        modules = loaded.linears(layer)
        originals |= {name: linear_weight(module).clone() for name, module in modules.items()}
        turned = turn_layer(loaded, layer, modules)
        assert len(turned) == 2
        for name in turned:
            weight = linear_weight(modules[name])
            assert (weight - originals[name]).norm() > 0.5 * weight.norm()
            torch.testing.assert_close(as_in_the_model(loaded, name, weight), originals[name], rtol=0, atol=1e-6)
    assert float((_logits(loaded.model) - before).abs().max()) < SAME * float(before.abs().max())
    with torch.no_grad():
        name = turned[1]
        weight = linear_weight(modules[name])
        weight.copy_(as_in_the_model(loaded, name, weight))
    assert float((_logits(loaded.model) - before).abs().max()) > MOVED * float(before.abs().max())


def test_nothing_is_turned_where_one_of_both_is_not_quantized(tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model("llama")))
    values, output = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
    before = loaded.model.get_submodule(values).weight.detach().clone()
    for quantized in ({values}, {output}, set()):
        assert turn_layer(loaded, 0, quantized) == ()
    assert torch.equal(loaded.model.get_submodule(values).weight, before)
    assert turn_layer(loaded, 0, {values, output}) == (values, output)


@pytest.mark.filterwarnings("ignore")  # the models' own code warns
@pytest.mark.parametrize("model_type", CONFIGS)
def test_only_what_is_proved_on_a_small_model_is_turned(model_type: str) -> None:
    """Of grouped values, values with a gate behind them, of merged modules, of latent and shared ones."""
    plain = {"granite", "cohere2", "gemma2", "olmo2", "nemotron", "xglm", "lfm2"}
    model = traced_model(model_type).float()
    family = detect_family(model)
    found = [turn for layer in range(len(family.kinds)) for turn in family.kind_of(layer).turns]
    if model_type == "granite":  # of llama's structure, which its record does not list
        found = [turn for kind in trace_blocks(model, "model.layers") for turn in kind.turns]
    assert bool(found) == (model_type in plain)
    if not found:
        return
    before = _logits(model)
    for layer, kind in enumerate(trace_blocks(model, family.blocks)):
        block = model.get_submodule(f"{family.blocks}.{layer}")
        for turn in kind.turns:
            width = len(linear_weight(block.get_submodule(turn.values))) // turn.heads
            assert width == 16
            modules = {name: block.get_submodule(name) for name in (turn.values, turn.output)}
            with torch.no_grad():
                Turning(turn.values, turn.output, width).apply(modules)
    assert float((_logits(model) - before).abs().max()) < 1e-5 * float(before.abs().max())


@pytest.mark.filterwarnings("ignore")
def test_values_that_are_cut_off_are_not_turned() -> None:
    model = traced_model("olmo2")
    model.config.clip_qkv = 8.0  # small random values stay below it, which would prove the wrong thing
    assert [kind.turns for kind in trace_blocks(model, "model.layers")] == [(), ()]


def test_of_another_model_of_a_known_structure_a_small_one_is_asked(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its attention does with values only its own code knows."""
    loaded = load_model(str(tiny_model("llama")))
    known = list(layer_turnings(loaded, 0))
    loaded.model.config.model_type = "granite"
    assert list(layer_turnings(loaded, 0)) == known != []
    monkeypatch.setattr(turns, "EQUAL", 0.0)
    monkeypatch.setattr(tracing, "_traced", {})
    assert list(layer_turnings(loaded, 0)) == []


def test_heads_that_do_not_divide_are_not_turned(tiny_model: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny_model("llama")))
    loaded.model.config.num_key_value_heads = 3
    assert not list(layer_turnings(loaded, 0))


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits
