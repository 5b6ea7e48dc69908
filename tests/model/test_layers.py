from __future__ import annotations

import numpy as np
import pytest

from quant_fairness_plugin.errors import InvalidLayerError
from quant_fairness_plugin.model.layers import check_layers, parse_layers


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0,9,11", (0, 9, 11)), ("11, 0 ,9", (0, 9, 11)), (" 3 ", (3,)), ("0,1,2,3,4,5,6,7,8,9,10", tuple(range(11)))],
)
def test_a_layer_list_becomes_an_ascending_tuple(text: str, expected: tuple[int, ...]) -> None:
    assert parse_layers(text, 12) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"'' is not a layer index; expected indices 0\.\.11"),
        ("   ", "is not a layer index"),
        ("0,,3", "'' is not a layer index"),
        ("0,3,", "'' is not a layer index"),
        ("first", "'first' is not a layer index"),
        ("0;3", "'0;3' is not a layer index"),
        ("1.5", "'1.5' is not a layer index"),
        ("1_0", "'1_0' is not a layer index"),
        ("+3", r"'\+3' is not a layer index"),
        ("٣", "'٣' is not a layer index"),
        ("0x1", "'0x1' is not a layer index"),
        ("9" * 5000, "9…' is not a layer index"),
        ("-1", r"layer -1 does not exist: the model has 12 layers, 0\.\.11"),
        ("12", "layer 12 does not exist"),
        ("3,0,3", "layer 3 is listed more than once"),
        ("3,03", "layer 3 is listed more than once"),
        ("0,1,2,3,4,5,6,7,8,9,10,11", "names all 12 layers, so nothing would be quantized"),
    ],
)
def test_a_layer_list_that_does_not_fit_is_an_error_on_one_line(text: str, complaint: str) -> None:
    with pytest.raises(InvalidLayerError, match=complaint) as caught:
        parse_layers(text, 12)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.exit_code == 2


def test_integers_of_numpy_are_layers() -> None:
    layers = check_layers(np.array([9, 0]).tolist(), 12), check_layers([np.int64(9), np.int8(0)], 12)
    assert layers == ((0, 9), (0, 9))
    assert all(type(layer) is int for layer in layers[1])


@pytest.mark.parametrize("entry", [True, 1.0, "1", None])
def test_anything_else_is_no_layer(entry: object) -> None:
    with pytest.raises(InvalidLayerError, match="is not a layer index; expected one of 0"):
        check_layers([entry], 12)  # type: ignore[list-item]


def test_an_empty_sequence_names_the_way_out() -> None:
    with pytest.raises(InvalidLayerError, match=r"empty; name at least one of 0\.\.11, or say 'none'"):
        check_layers([], 12)


def test_the_only_layer_of_a_model_cannot_be_protected() -> None:
    with pytest.raises(InvalidLayerError, match="names all 1 layers"):
        check_layers([0], 1)
