from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from quant_fairness_plugin.config import FairConfig, FairOptions, make_config
from quant_fairness_plugin.errors import ConfigError


def test_options_name_every_field_of_the_configuration() -> None:
    assert list(get_type_hints(FairOptions)) == [field.name for field in fields(FairConfig)]


def test_lists_become_tuples() -> None:
    config = make_config(protect_layers=[0, 9, 11], languages=["en", "he"])
    assert config.protect_layers == (0, 9, 11)
    assert config.languages == ("en", "he")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bits": 3.5}, r"bits 3\.5 is not an integer from 2 to 8"),
        ({"bits": 9}, "bits 9 is not an integer from 2 to 8"),
        ({"bits": True}, "bits True is not an integer"),
        ({"bits": "4"}, "bits '4' is not an integer"),
        ({"group_size": 100}, "group size 100 is read by no server; use 32, 64, 128, or -1"),
        ({"method": "magic"}, "method 'magic': Input should be 'rtn', 'gptq' or 'awq'"),
        ({"protect_layers": "most"}, "protect_layers 'most': Input should be 'auto' or 'none'"),
        ({"max_overhead": -0.1}, r"max_overhead -0\.1 is no share"),
        ({"draws": 10}, "draws 10 are too few"),
        ({"method": "rtn", "calibration": "english"}, "calibration 'english' has no effect on method 'rtn'"),
        ({"calibration": "proportional", "tokens_per_language": 9}, "takes all tokens of every language, not 9 each"),
        ({"colour": 1}, "known names: method, bits"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


def test_units_and_8_bit_layers_are_overrides_of_a_plan() -> None:
    config = make_config(protect_units=["3.down", "5.qkv"], int8_layers=[5, 0], protect_layers=[1])
    assert config.overrides == {
        "layers.5": "int8",
        "layers.0": "int8",
        "layers.3.down": "fp16",
        "layers.5.qkv": "fp16",
    }
    assert make_config().overrides == {}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"protect_units": ["3"]}, "protect_units '3' is not a unit; write LAYER.UNIT, such as 3.down"),
        ({"protect_units": ["down.3"]}, "is not a unit"),
        ({"protect_units": ["-1.down"]}, "is not a unit"),
        ({"protect_units": [""]}, "protect_units '' is not a unit"),
        ({"protect_units": ["3.down", "3.down"]}, r"3\.down is listed more than once"),
        ({"int8_layers": [4, 4]}, "4 is listed more than once"),
        ({"int8_layers": [-1]}, "-1 is negative"),
        ({"int8_layers": [3], "protect_layers": [0, 3]}, "3 is in protect_layers 0,3 too"),
        ({"protect_units": ["3.down"], "protect_layers": [3]}, r"3\.down is in protect_layers 3 too"),
    ],
)
def test_precisions_that_contradict_each_other_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


@pytest.mark.parametrize(("method", "symmetric"), [("awq", False), ("gptq", True), ("rtn", True)])
def test_each_method_has_its_own_grid_unless_told(method: str, symmetric: bool) -> None:
    assert make_config(method=method).grid.symmetric is symmetric
    assert make_config(method=method, symmetric=not symmetric).grid.symmetric is not symmetric


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"protect_columns": 0.51}, "protect_columns 0.51 is no share of the input channels up to 0.5"),
        ({"protect_columns": -0.01}, "protect_columns -0.01 is no share"),
        ({"protect_columns": float("nan")}, "protect_columns nan is no share"),
        ({"protect_columns": 0.01, "method": "rtn"}, "cannot be used with method 'rtn' and backend 'native'"),
        (
            {"protect_columns": 0.01, "backend": "gptqmodel"},
            "cannot be used with method 'gptq' and backend 'gptqmodel'",
        ),
    ],
)
def test_columns_that_cannot_be_chosen_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


def test_columns_may_be_kept_with_both_calibrated_methods() -> None:
    assert make_config(protect_columns=0.01, method="awq").protect_columns == 0.01
    assert make_config(protect_columns=0.5).protect_columns == 0.5


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"precisions": ("int8",)}, "a checkpoint holds fp16, or fp16,int8"),
        ({"precisions": ("fp16", "int5")}, "precisions fp16,int5"),
        ({"precisions": ("fp16", "int8"), "top": 3}, "top 3 is a number of layers in 16 bit"),
        ({"precisions": ("fp16", "int8"), "bits": 8}, "bits 8 is the same"),
    ],
)
def test_precisions_that_auto_cannot_choose_from(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)
