from __future__ import annotations

from pathlib import Path

import pytest

from quant_fairness_plugin.artifacts import Part
from quant_fairness_plugin.cli.field import Declared, declared_fields
from quant_fairness_plugin.cli.options import default_output, parse_calibrations, require_model
from quant_fairness_plugin.cli.recommend_options import parse_weights
from quant_fairness_plugin.cli.sweep_options import (
    ExecutionOptions,
    PlansOptions,
    SearchOptions,
    parse_combine,
    parse_modes,
)
from quant_fairness_plugin.config import FairConfig, make_config
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import (
    parse_bits,
    parse_group_size,
    parse_int8_layers,
    parse_languages,
    parse_names,
    parse_precisions,
    parse_protection,
    parse_reference,
    parse_share,
)
from quant_fairness_plugin.errors import ConfigError, InvalidLayerError


@pytest.mark.parametrize(
    ("text", "layers"),
    [("auto", "auto"), (" NONE ", "none"), ("0,9,11", (0, 9, 11)), ("11, 0", (11, 0)), ("-1", (-1,))],
)
def test_protection(text: str, layers: object) -> None:
    assert parse_protection(text) == layers


@pytest.mark.parametrize("text", ["", "0,", "first", "0;1", "0.5"])
def test_a_word_is_no_layer_list(text: str) -> None:
    with pytest.raises(InvalidLayerError, match="use 'auto', 'none', or indices such as 0,9,11"):
        parse_protection(text)


def test_languages() -> None:
    assert parse_languages("en, he") == ("en", "he")


@pytest.mark.parametrize("text", ["", "en,,he", ","])
def test_an_empty_language_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="holds an empty name"):
        parse_languages(text)


def test_reference() -> None:
    assert parse_reference("none") is None
    assert parse_reference("he") == "he"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bits", "3.5", r"bits '3\.5' is not an integer from 2 to 8"),
        ("bits", "16", "bits 16 is not an integer from 2 to 8"),
        ("group-size", "100", "group size 100 is read by no server"),
        ("group-size", "many", "group size 'many' is read by no server"),
    ],
)
def test_an_integer_option_says_what_is_accepted(name: str, text: str, message: str) -> None:
    parse = {"bits": parse_bits, "group-size": parse_group_size}[name]
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), (" 2.5 % ", 0.025), ("0.01", 0.01), ("0", 0.0)])
def test_a_share_is_a_percentage_or_a_number(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "%", "one", "1%%"])
def test_a_share_that_is_no_number_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is no share; use a percentage such as 1%, or 0.01"):
        parse_share(text)


def test_integers() -> None:
    assert parse_bits("4") == 4
    assert parse_group_size("-1") == -1


def test_modes() -> None:
    assert parse_modes("both") == ("protect-one", "quantize-one")
    assert parse_modes("quantize-one") == ("quantize-one",)
    with pytest.raises(ConfigError, match="use protect-one, quantize-one or both"):
        parse_modes("protect")


def test_what_is_singled_out_and_how_many() -> None:
    granularity = declared_fields(PlansOptions)["granularity"]
    assert [granularity.parse(word) for word in ("layer", "unit")] == ["layer", "unit"]
    assert [parse_combine(word) for word in ("1", "2", "3")] == [1, 2, 3]
    with pytest.raises(ConfigError, match="--granularity 'units' is unknown; use layer or unit"):
        granularity.parse("units")
    for text in ("0", "4", "two", "2.0"):
        with pytest.raises(ConfigError, match=f"--combine '{text}' is not allowed; use 1"):
            parse_combine(text)


def test_executors() -> None:
    executor = declared_fields(ExecutionOptions)["executor"]
    assert executor.default is None
    assert [executor.parse(word) for word in ("local", "processes", "ray")] == ["local", "processes", "ray"]
    with pytest.raises(ConfigError, match="--executor 'dask' is unknown; use local, processes or ray"):
        executor.parse("dask")


def test_part() -> None:
    part = Declared("part", Option("Sentences to measure on:", "Texts"), Part, "confirm")
    assert part.parse("confirm") == "confirm"
    with pytest.raises(ConfigError, match="--part 'test' is unknown; use calibrate, search, confirm or all"):
        part.parse("test")


def test_a_model_must_be_named() -> None:
    assert require_model("demo") == "demo"
    with pytest.raises(ConfigError, match="--model demo"):
        require_model(None)


def test_biases_cannot_be_quantized() -> None:
    assert make_config(protect_biases=True).protect_biases
    with pytest.raises(ConfigError, match="every checkpoint format keeps biases in 16 bit"):
        make_config(protect_biases=False)


@pytest.mark.parametrize(
    ("model", "out"),
    [
        ("demo", "demo-int4-fair"),
        ("org/model", "model-int4-fair"),
        ("/some/folder/", "folder-int4-fair"),
        ("/some/folder/model.safetensors", "folder-int4-fair"),
    ],
)
def test_the_default_output_is_named_after_the_model(model: str, out: str) -> None:
    assert default_output(model) == Path(out)


def test_calibrations() -> None:
    assert parse_calibrations("english, Minimax") == ("english", "minimax")


@pytest.mark.parametrize("text", ["", "uniform,", "uniform,uniform", "french"])
def test_other_words_are_no_calibrations(text: str) -> None:
    with pytest.raises(ConfigError, match="name each one once, of uniform, proportional, english, minimax"):
        parse_calibrations(text)


def test_units_and_8_bit_layers() -> None:
    fields = declared_fields(FairConfig)
    assert fields["protect_units"].default == fields["int8_layers"].default == ()
    assert parse_names("3.down, 5.qkv") == ("3.down", "5.qkv")
    assert parse_int8_layers("3, 5") == (3, 5)


@pytest.mark.parametrize("text", ["", "3,", "three", "3.down"])
def test_8_bit_layers_are_layer_indices(text: str) -> None:
    with pytest.raises(InvalidLayerError, match="--int8-layers .* is not a list of layer indices"):
        parse_int8_layers(text)


def test_precisions_are_names() -> None:
    assert parse_precisions("fp16") == ("fp16",)
    assert parse_precisions(" fp16, INT8 ") == ("fp16", "int8")
    for text in ("", "fp16,", "int7", "8"):
        with pytest.raises(ConfigError, match="write some of fp16, int8, int6, int5, int4g32, int4, int3, int2"):
            parse_precisions(text)


def test_a_search_is_one_of_three() -> None:
    assert SearchOptions(size=0, width=0).to_search("bpb") is None
    search = SearchOptions(search="beam", size=4, width=2).to_search("mean")
    assert search is not None
    assert (search.method, search.size, search.width, search.objective) == ("beam", 4, 2, "mean")
    with pytest.raises(ConfigError, match="--search 'best' is unknown; use greedy, backward or beam"):
        declared_fields(SearchOptions)["search"].parse("best")
    with pytest.raises(ConfigError, match="cannot be searched by 'bpb'; use objective worst or mean"):
        SearchOptions(search="beam").to_search("bpb")


def test_sizes_targets_and_limits_are_read() -> None:
    declared = declared_fields(FairConfig)
    assert declared["max_size"].parse("1.5 MB") == 1_500_000
    assert declared["target"].parse("worst=0.1") == "worst=0.1"
    assert declared["limits"].parse("he=0.05, zh=0.1") == {"he": 0.05, "zh": 0.1}
    with pytest.raises(ConfigError, match="--limit 'he': write LANGUAGE=NUMBER"):
        declared["limits"].parse("he")
    with pytest.raises(ConfigError, match="size '12 apples' is none"):
        declared["max_size"].parse("12 apples")


def test_weights_are_numbers_by_language() -> None:
    assert parse_weights("en=1, fi = 2.5") == {"en": 1.0, "fi": 2.5}
    for text in ("", "en", "en=", "en=x", "en=1,"):
        with pytest.raises(ConfigError, match="write LANGUAGE=NUMBER with commas between"):
            parse_weights(text)
    for text in ("=1", "en=1,en=2"):
        with pytest.raises(ConfigError, match="name each language once"):
            parse_weights(text)


def test_dtypes_to_compute_in() -> None:
    dtype = declared_fields(FairConfig)["dtype"]
    assert [dtype.parse(word) for word in ("auto", "float32", "bfloat16")] == ["auto", "float32", "bfloat16"]
    with pytest.raises(ConfigError, match="--dtype 'float16' is unknown; use auto, float32 or bfloat16"):
        dtype.parse("float16")
