from __future__ import annotations

from collections.abc import Callable

import pytest

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.selection import fitting_group_size, group_sizes, select_modules, usual_group_size
from tests.tiny import FAMILIES

Load = Callable[..., LoadedModel]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_modules_of_unprotected_layers_are_selected_in_forward_order(load: Load, family: str) -> None:
    loaded = load(family)
    selection = select_modules(loaded, Grid(group_size=32), protected=[0])
    assert selection.modules == loaded.family.full_names(1)
    assert selection.kept == {}
    assert selection.protected == (0,)


def test_nothing_protected_selects_every_layer(load: Load) -> None:
    selection = select_modules(load(), Grid(group_size=32))
    assert list(selection.units) == [0, 1]
    assert selection.protected == ()


def test_modules_that_the_group_does_not_fit_are_kept_and_listed(load: Load) -> None:
    loaded = load(width=48)  # MLP 96
    selection = select_modules(loaded, Grid(group_size=32), protected=[1])
    assert selection.modules == ("model.layers.0.mlp.down_proj",)
    assert set(selection.kept) == set(loaded.family.full_names(0)) - set(selection.modules)
    assert selection.kept["model.layers.0.self_attn.o_proj"] == "48 input channels are not a multiple of group size 32"


def test_a_fusion_group_is_kept_as_a_whole(load: Load) -> None:
    selection = select_modules(load(width=40), Grid(group_size=-1))  # heads of 10: q has 40 rows, k and v have 20
    kept = {name: reason for name, reason in selection.kept.items() if name.startswith("model.layers.0.")}
    assert set(kept) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert kept["model.layers.0.self_attn.k_proj"].startswith("20 output channels")
    assert kept["model.layers.0.self_attn.q_proj"].startswith(
        "shares a fusion group with model.layers.0.self_attn.k_proj"
    )


def test_a_group_that_fits_no_module_is_an_error(load: Load) -> None:
    with pytest.raises(ConfigError, match="int4 g128 sym absmax fits no module .*q_proj: 40 input channels.*or -1"):
        select_modules(load(width=40), Grid(group_size=128))


def test_each_unit_takes_the_largest_size_that_divides_its_columns(load: Load) -> None:
    loaded = load(width=96)  # the MLP is twice as wide
    selection = select_modules(loaded, Grid(group_size=128), overrides={"layers.1.down": "int8"})
    assert selection.kept == {}
    for name, grid in selection.grids.items():
        columns = loaded.matrix(name)[1]
        assert grid.group_size == max(size for size in (32, 64, 128) if columns % size == 0)
    assert {grid.group_size for grid in selection.grids.values()} == {32, 64}
    assert selection.grids["model.layers.1.mlp.down_proj"] == Grid(bits=8, group_size=64)
    assert group_sizes(loaded, Grid(group_size=128), protected=[0]) == {
        "layers.1.qkv": 32, "layers.1.o": 32, "layers.1.gate_up": 32, "layers.1.down": 64,
    }  # fmt: skip


def test_a_stated_size_is_the_largest(load: Load) -> None:
    selection = select_modules(load(width=128), Grid(group_size=64))  # 128 would fit
    assert {grid.group_size for grid in selection.grids.values()} == {64}
    rows = select_modules(load(width=96), Grid(group_size=-1))
    assert {grid.group_size for grid in rows.grids.values()} == {-1}


def test_a_bad_grid_is_an_error(load: Load) -> None:
    with pytest.raises(ConfigError, match="group size 48 is read by no server"):
        select_modules(load(width=48), Grid(group_size=48))


@pytest.mark.parametrize("layers", [[2], [-1], [0, 0], [0, 1]])
def test_bad_layers_are_errors(load: Load, layers: list[int]) -> None:
    with pytest.raises(InvalidLayerError, match="layer"):
        select_modules(load(), Grid(group_size=32), protected=layers)


def test_a_layer_in_int8_has_a_grid_of_its_own(load: Load) -> None:
    loaded, grid = load(), Grid(bits=4, group_size=32, clip="mse")
    selection = select_modules(loaded, grid, overrides={"layers.1": "int8"})
    assert selection.modules == loaded.family.full_names(0) + loaded.family.full_names(1)
    assert {selection.grids[name] for name in loaded.family.full_names(0)} == {grid}
    assert {selection.grids[name] for name in loaded.family.full_names(1)} == {Grid(bits=8, group_size=32, clip="mse")}


def test_a_unit_in_16_bit_is_left_out_as_a_whole_and_is_no_misfit(load: Load) -> None:
    loaded = load()
    selection = select_modules(loaded, Grid(group_size=32), overrides={"layers.0.gate_up": "fp16"})
    left_out = {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert set(loaded.family.full_names(0)) - set(selection.modules) == left_out
    assert not left_out & set(selection.grids)
    assert selection.kept == {}
    assert selection.protected == ()  # the rest of the layer is quantized


def test_a_units_own_precision_beats_its_layers(load: Load) -> None:
    loaded = load()
    overrides: dict[str, Precision] = {"layers.0": "int8", "layers.0.down": "int4", "layers.0.qkv": "fp16"}
    selection = select_modules(loaded, Grid(bits=3, group_size=32), protected=[1], overrides=overrides)
    bits = {name.removeprefix("model.layers.0."): own.bits for name, own in selection.grids.items()}
    assert bits == {"self_attn.o_proj": 8, "mlp.gate_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 4}
    assert set(selection.grids) == set(selection.modules)


@pytest.mark.parametrize("name", ["layers.2", "layers.x", "layers.0.fc_in", "layers.0.mlp.down_proj", "layer"])
def test_an_override_that_names_no_unit_is_an_error(load: Load, name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"the model has no '{name}'; layers are 0..1, the units of layer [01] qkv, o"
    ):
        select_modules(load(), Grid(group_size=32), overrides={name: "fp16"})


def test_a_plan_that_leaves_nothing_to_quantize_is_an_error(load: Load) -> None:
    with pytest.raises(ConfigError, match="fits no module of the model: all units: in 16 bit by the plan"):
        select_modules(load(), Grid(group_size=32), overrides={"layers.0": "fp16", "layers.1": "fp16"})


@pytest.mark.parametrize(
    ("width", "largest", "usual", "uniform"),
    [
        (32, 64, 32, 32),
        (64, 128, 64, 64),
        (128, 128, 128, 128),
        (192, 128, 64, 64),
        (96, 64, 32, 32),
        (48, 32, 32, 32),
        (40, None, None, None),
    ],
)
def test_the_automatic_group_size(
    load: Load, width: int, largest: int | None, usual: int | None, uniform: int | None
) -> None:
    """The MLP is twice as wide: of width 48 only `down` (96 inputs) fits groups of 32, of width 40 nothing fits any."""
    loaded = load(width=width)
    assert fitting_group_size(loaded, 128, uniform=False) == largest
    assert usual_group_size(loaded, 128) == usual
    assert fitting_group_size(loaded, 128, uniform=True) == uniform
    if uniform is not None:
        grids = select_modules(loaded, Grid(group_size=uniform)).grids.values()
        assert {grid.group_size for grid in grids} == {uniform}
