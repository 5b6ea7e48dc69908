from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.exchange import stored_form, swapped
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.grid import quantize_rtn

Load = Callable[..., LoadedModel]
GRID = Grid(group_size=32)


def rounded(loaded: LoadedModel, layer: int) -> dict[str, Tensor]:
    """A layer's weights rounded to nearest, as its modules store them."""
    grids = {
        name: quantize_rtn(linear_weight(module), GRID, scale_dtype=loaded.storage_dtype)
        for name, module in loaded.linears(layer).items()
    }
    return {name: stored_form(loaded.linears(layer)[name], grid.dequantize()) for name, grid in grids.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_takes_the_modules_own_form(load: Load, family: str) -> None:
    loaded = load(family)
    for name, weight in rounded(loaded, 1).items():
        stored = loaded.model.get_parameter(f"{name}.weight")
        assert weight.shape == stored.shape
        assert weight.is_contiguous()
        plain = stored.t() if family == "gpt2" else stored  # Conv1D stores [in, out]
        expected = quantize_rtn(plain, GRID, scale_dtype=torch.float16).dequantize()
        assert torch.equal(weight.t() if family == "gpt2" else weight, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_swapping_changes_the_output_and_is_undone_bit_for_bit(load: Load, family: str) -> None:
    loaded = load(family)
    ids = torch.arange(20).unsqueeze(0)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in loaded.model.named_parameters()}
    with torch.no_grad():
        original = loaded.model(ids).logits
        bank = [rounded(loaded, layer) for layer in range(2)]
        with swapped(loaded, bank[1]) as model:
            assert model is loaded.model
            changed = model(ids).logits
            with swapped(loaded, bank[0] | bank[1]):
                both = model(ids).logits
            assert torch.equal(model(ids).logits, changed)
        assert torch.equal(loaded.model(ids).logits, original)
    assert not torch.equal(changed, original)
    assert not torch.equal(both, changed)
    for name, parameter in loaded.model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_undoes_the_swap(load: Load, error: type[BaseException]) -> None:
    loaded = load()
    weight = loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.detach().clone()
    bank = [rounded(loaded, layer) for layer in range(2)]
    with pytest.raises(error, match="midway"), swapped(loaded, bank[0]):  # noqa: PT012 # the state inside is the point
        assert not torch.equal(weight, before)
        raise error("midway")
    assert torch.equal(weight, before)


def test_weights_that_do_not_fit_are_errors_and_change_nothing(load: Load) -> None:
    loaded = load()
    name = "model.layers.0.mlp.up_proj"  # [64, 32]
    weight = loaded.model.get_parameter(f"{name}.weight")
    before = weight.detach().clone()
    for wrong in (weight.detach().t(), weight.detach().half()):
        with pytest.raises(ConfigError, match="up_proj: a weight .* cannot replace one that is"):
            swapped(loaded, {name: wrong}).__enter__()
    with pytest.raises(ConfigError, match="'lm_head' is neither a linear module of the model's blocks"):
        swapped(loaded, {name: before + 1, "lm_head": before}).__enter__()
    assert torch.equal(weight, before)


def test_any_parameter_can_be_swapped_by_its_full_name(load: Load) -> None:
    loaded = load()
    ids, name = torch.arange(20).unsqueeze(0), "model.layers.0.input_layernorm.weight"
    norm = loaded.model.get_parameter(name)
    before, pointer = norm.detach().clone(), norm.data_ptr()
    bank = rounded(loaded, 0)
    with torch.no_grad():
        original = loaded.model(ids).logits
        with swapped(loaded, {name: 2 * before}):
            doubled = loaded.model(ids).logits
        with swapped(loaded, bank | {name: 2 * before}):
            both = loaded.model(ids).logits
        with swapped(loaded, {"model.layers.0.mlp.up_proj.weight": bank["model.layers.0.mlp.up_proj"]}):
            by_parameter = loaded.model(ids).logits
        with swapped(loaded, {"model.layers.0.mlp.up_proj": bank["model.layers.0.mlp.up_proj"]}):
            assert torch.equal(loaded.model(ids).logits, by_parameter)
        assert torch.equal(loaded.model(ids).logits, original)
    assert not torch.equal(doubled, original)
    assert not torch.equal(both, doubled)
    assert norm.data_ptr() == pointer
    assert torch.equal(norm, before)
    with pytest.raises(
        ConfigError, match=r"input_layernorm.weight: a weight \[31\] .* cannot replace one that is \[32\]"
    ):
        swapped(loaded, {name: before[:31]}).__enter__()


def test_stored_form_follows_the_module(load: Load) -> None:
    loaded = load("gpt2")
    module = loaded.linears(0)["transformer.h.0.mlp.c_fc"]
    weight = torch.randn(64, 32, dtype=torch.float64)
    stored = stored_form(module, weight)
    assert stored.is_contiguous()
    assert stored.dtype == torch.float32
    assert torch.equal(stored, weight.t().float())
