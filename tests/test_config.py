from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from quant_fairness_plugin.artifacts import TextSet
from quant_fairness_plugin.config import FairConfig, FairOptions, make_config
from quant_fairness_plugin.config.parsers import parse_limits, read_duration
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model


def with_lists(hint: Any) -> set[Any]:
    """The alternatives of a type, with a list beside each tuple."""
    every = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    return every | {list[get_args(kind)[0]] for kind in every if get_origin(kind) is tuple}


def test_options_are_the_fields_of_the_configuration() -> None:
    options, config = get_type_hints(FairOptions), get_type_hints(FairConfig)
    assert list(options) == [field.name for field in fields(FairConfig)]
    # Of the texts, the options take the set itself, too; of which the configuration keeps the name.
    assert with_lists(options.pop("texts")) - {config.pop("texts")} == {Path, TextSet}
    assert {name: with_lists(options[name]) for name in options} == {name: with_lists(config[name]) for name in options}


def test_a_list_beside_a_tuple_would_be_missed() -> None:
    assert with_lists(tuple[int, ...]) == {tuple[int, ...], list[int]} != {tuple[int, ...]}
    assert with_lists(tuple[int, ...] | None) != with_lists(tuple[str, ...] | None)


CONFIGS = [
    {},
    {"protect_layers": (0, 9, 11), "languages": ("en", "no"), "reference": None, "max_overhead": 0.1 + 0.2},
    {"protect_layers": "none", "protect_units": ("3.down",), "int8_layers": (1, 2), "method": "awq", "symmetric": True},
    {"target": "mean=0.1", "limits": {"he": 0.05}, "exhaustive": True},
    {"time": "10min", "sentences": 6},
    {"precisions": ("fp16", "int8"), "tokens_per_language": 500, "strict": True, "seed": 7, "quantize_rest_to": "INT4"},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_a_configuration_comes_back_from_plain_data_exactly(values: dict[str, Any]) -> None:
    config = FairConfig(**values)
    document = config.to_dict()
    assert list(document) == [field.name for field in fields(FairConfig)]
    assert FairConfig.from_dict(json.loads(json.dumps(document))) == FairConfig.from_dict(document) == config
    assert not any(isinstance(value, tuple) for value in document.values())


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"colour": 1}, "colour 1: Unexpected keyword argument; known names: method, bits"),
        ({4: 1}, "4 1: Unexpected keyword argument"),
        ({"bits": "4"}, "bits '4' is not an integer"),
        ({"draws": "2000"}, "draws '2000': Input should be a valid integer"),
        ({"seed": True}, "seed True: Input should be a valid integer"),
        ({"strict": "yes"}, "strict 'yes': Input should be a valid boolean"),
        ({"languages": "en"}, "languages 'en': Input should be a valid"),
        ({"languages": ["en", False]}, "languages False: Input should be a valid string"),
        ({"protect_layers": "0,9"}, r"protect_layers '0,9': .* or a list of layer indices such as \[0, 9, 11\]"),
        ({"max_overhead": float("nan")}, "max_overhead nan is no share"),
        ({"seed": date(2026, 1, 1)}, "seed '2026-01-01': Input should be a valid integer"),
    ],
)
def test_a_document_is_held_to_the_types(document: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FairConfig.from_dict(document)


def test_the_research_scripts_settings_are_accepted() -> None:
    typed = make_config(protect_layers=[0, 9, 11], protect_biases=True, protect_final_ln=True, quantize_rest_to="INT4")
    assert (typed.bits, typed.protect_layers) == (4, (0, 9, 11))
    assert make_config(quantize_rest_to="INT8").bits == FairConfig.from_dict({"quantize_rest_to": "int8"}).bits == 8
    assert make_config(quantize_rest_to="int4", bits=4).bits == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantize_rest_to": "INT8", "bits": 4}, "'INT8' and bits 4 contradict each other"),
        ({"quantize_rest_to": "INT4", "bits": 3}, "'INT4' and bits 3 contradict each other"),
        ({"quantize_rest_to": "FP4"}, "quantize_rest_to 'FP4' is not an integer type; use 'INT4' or 'INT8'"),
        ({"protect_biases": False}, "protect_biases False .*: every checkpoint format keeps biases in 16 bit"),
        ({"protect_final_ln": False}, "protect_final_ln False .*: every checkpoint format keeps the final norm in 16"),
    ],
)
def test_what_no_checkpoint_stores_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**values)


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
        ({"method": "magic"}, "method 'magic' is unknown; use 'rtn', 'gptq' or 'awq'"),
        ({"protect_layers": "most"}, "protect_layers 'most': Input should be 'auto' or 'none'"),
        ({"max_overhead": -0.1}, r"max_overhead -0\.1 is no share"),
        ({"objective": "fastest"}, "objective 'fastest' is not known; use one of worst, mean, bpb, excess, disparity"),
        ({"draws": 10}, "draws 10 are too few"),
        ({"method": "rtn", "calibration": "english"}, "calibration 'english' has no effect on method 'rtn'"),
        ({"method": "awq", "effort": "best"}, "effort 'best' has no effect on method 'awq'.* use method 'gptq'"),
        (
            {"backend": "gptqmodel", "effort": "fast"},
            "with backend 'gptqmodel'; use method 'gptq' with backend 'native'",
        ),
        ({"effort": "most"}, "effort 'most': Input should be 'fast', 'normal' or 'best'"),
        ({"calibration": "proportional", "tokens_per_language": 9}, "takes all tokens of every language, not 9 each"),
        ({"tokens_per_expert": 0}, "tokens_per_expert 0 cannot be used with method 'gptq'"),
        ({"tokens_per_expert": 9, "method": "rtn"}, "tokens_per_expert 9 cannot be used with method 'rtn'"),
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
    ("chosen", "menu"),
    [
        ({}, ("fp16", "int8", "int4g32")),
        ({"group_size": 32}, ("fp16", "int8")),
        ({"format": "gptq"}, ("fp16", "int8")),
        ({"bits": 8}, ("fp16",)),
        ({"precisions": ("fp16", "int4g32")}, ("fp16", "int4g32")),
    ],
)
def test_what_auto_chooses_from(chosen: dict[str, Any], menu: tuple[str, ...]) -> None:
    assert make_config(**chosen).menu == menu


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"precisions": ("int8",)}, "a checkpoint holds fp16, or fp16 with int8 and int4g32; name"),
        ({"precisions": ("fp16", "int5")}, "precisions fp16,int5"),
        ({"precisions": ("fp16", "int4"), "format": "gguf"}, "holds fp16, or fp16 with int8 and int5; name those"),
        ({"precisions": ("fp16", "int8"), "top": 3}, "top 3 is a number of layers in 16 bit"),
        ({"precisions": ("fp16", "int8"), "bits": 8}, "bits 8 is no less; leave int8 out"),
        ({"precisions": ("fp16", "int8", "int5"), "bits": 5, "format": "gguf"}, "bits 5 is no less; leave int5 out"),
    ],
)
def test_precisions_that_auto_cannot_choose_from(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"max_size": 10**8, "target_bits": 4.5}, "max_size and target_bits exclude each other"),
        ({"target": "worst=0.1", "top": 3}, "target and top exclude each other"),
        ({"limits": {"he": 0.05}, "top": 3}, "limits of languages and top 3 exclude each other"),
        ({"max_size": 0}, "max_size 0 is no size"),
        ({"target_bits": 1.5}, "target_bits 1.5 is no width between 2 and 16"),
        ({"target": "disparity=1.2"}, "a target is one of worst or mean; write worst=0.1"),
        ({"target": "worst"}, "write a KL in bits per byte, such as 0.1 or worst=0.1"),
        ({"target": "worst=-1"}, "give the largest KL to accept, in bits per byte, above 0"),
        ({"limits": {"he": 0.0}}, "limit he=0.0: give the largest KL to accept"),
    ],
)
def test_limits_that_no_plan_keeps_are_refused(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"time": "10"}, "time '10' is no duration above 0; write a number with its unit: 90s, 10min or 1h"),
        ({"time": "0s"}, "time '0s' is no duration above 0"),
        ({"time": "-5min"}, "time '-5min' is no duration"),
        ({"time": 600}, "time 600: Input should be a valid string"),
        (
            {"time": "1h", "protect_layers": "none"},
            "time 1h bounds .*, and protect_layers none leaves no plan",
        ),
        ({"time": "1h", "protect_layers": (0,)}, "protect_layers 0 leaves no plan"),
        ({"time": "1h", "top": 2}, "top 2 is the first of a sweep of layers"),
        ({"time": "1h", "exhaustive": True}, "exhaustive asks for a sweep"),
        ({"time": "1h", "precisions": ("fp16",)}, "precisions fp16 asks for a sweep"),
        ({"sentences": 4, "objective": "disparity"}, "sentences 4 bounds the search .* disparity asks for a sweep"),
        ({"sentences": 1}, "sentences 1 are too few to compare plans on; use 2 or more"),
    ],
)
def test_bounds_of_a_search_that_is_not_made_or_cannot_be_kept_are_refused(
    chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1h", 3600), (" 1.5 min ", 90)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds
    assert FairConfig(time=text).time == text


def test_auto_scores_units_unless_a_sweep_is_asked_for() -> None:
    assert FairConfig().scores_units
    assert FairConfig().menu == FairConfig(exhaustive=True).menu == ("fp16", "int8", "int4g32")
    assert FairConfig(bits=8).menu == ("fp16",)
    assert FairConfig(format="gguf").menu == ("fp16", "int8", "int5")
    assert FairConfig(format="gguf", bits=5).menu == ("fp16", "int8")
    swept = ({"precisions": ("fp16",)}, {"top": 3}, {"exhaustive": True}, {"objective": "disparity"})
    assert not any(make_config(**values).scores_units for values in (*swept, {"protect_layers": "none"}))
    assert FairConfig(top=3).menu == ("fp16",)
    assert (FairConfig(target="mean=0.1").decides_by, FairConfig(target="0.1").decides_by) == ("mean", "worst")


def test_the_group_size_is_left_to_the_model_unless_it_is_given(tiny_model: Callable[..., Path]) -> None:
    outline = outline_model(resolve_model(str(tiny_model(width=64))))
    assert FairConfig(group_size=128).fitted(outline).grid.group_size == 128  # that of `down`
    assert FairConfig().fitted(outline).grid.group_size == 64  # that of all others
    assert FairConfig().fitted(outline, uniform=True).grid.group_size == 64
    assert FairConfig(group_size=32).fitted(outline) == FairConfig(group_size=32)
    assert FairConfig(group_size=-1).fitted(outline, uniform=True).grid.group_size == -1
    narrow = outline_model(resolve_model(str(tiny_model(width=40))))
    assert FairConfig().fitted(narrow).grid.group_size == -1
    assert FairConfig(group_size=64).fitted(narrow).grid.group_size == 64  # refused where modules are selected


def test_a_stated_group_size_that_does_not_fit_is_said_and_refused_where_strict(
    tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    outline = outline_model(resolve_model(str(tiny_model(width=96))))
    for fitting in (FairConfig(strict=True), FairConfig(group_size=32, strict=True), FairConfig(group_size=-1)):
        fitting.check_group_size(outline)
    assert not caplog.messages
    FairConfig(group_size=128).check_group_size(outline)
    [line] = caplog.messages
    assert line == (
        "group size 128 does not divide the input channels of 8 of 8 units, first layers.0.qkv: they take 64 or 32"
    )
    with pytest.raises(ConfigError, match="group size 64 .* 6 of 8 units, first layers.0.qkv; they would take 32. Use"):
        FairConfig(group_size=64, strict=True).check_group_size(outline)


def test_a_seed_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed -1 is below 0"):
        make_config(seed=-1)


def test_limits_are_by_the_language_and_not_by_its_spelling() -> None:
    assert parse_limits("iw=0.5, zh-Hans=0.1") == {"he": 0.5, "zh": 0.1}
    with pytest.raises(ConfigError, match="name each language once"):
        parse_limits("iw=0.5,he=0.1")
    with pytest.raises(ConfigError, match="xq"):
        parse_limits("xq1=0.5")
