"""Layers and units with a precision of their own are checked against the model before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import InvalidLayerError, UnsupportedModelError
from quant_fairness_plugin.preflight import ModelSource, check_units, known_units, preflight


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"int8_layers": [2]}, r"2: layer 2 does not exist: the model has 2 layers, accepted are 0\.\.1"),
        ({"protect_units": ["5.down"]}, r"5\.down: layer 5 does not exist"),
        ({"protect_units": ["1.fc_in"]}, r"1\.fc_in is not a unit of the model; its layers have qkv, o, gate_up, down"),
    ],
)
def test_a_unit_that_the_model_lacks_fails_early(
    tiny_model: Callable[..., Path], chosen: dict[str, Any], message: str
) -> None:
    source = ModelSource(str(tiny_model("llama", layers=2)))
    preflight(source, make_config(protect_units=["1.down", "0.gate_up"], protect_layers="none"))
    with pytest.raises(InvalidLayerError, match=message):
        preflight(source, make_config(protect_layers="none", **chosen))


def test_a_format_that_cannot_hold_the_layers_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    config = make_config(format="awq", int8_layers=[0], protect_layers="none")
    with pytest.raises(UnsupportedModelError, match="4-bit integers only"):
        preflight(ModelSource("no-such-model"), config, out=tmp_path / "out")


def test_units_of_an_unknown_architecture_are_left_for_later() -> None:
    assert known_units("opt") == ("qkv", "o", "fc_in", "fc_out")
    assert known_units("strange") is None
    check_units(make_config(protect_units=["1.anything"]), units=None, layers=2)
