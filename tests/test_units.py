from __future__ import annotations

import pytest

from quant_fairness_plugin.artifacts import Unit
from quant_fairness_plugin.errors import ConfigError


@pytest.mark.parametrize(
    "name", ["layers.0", "layers.3.down", "layers.11.gate_up", "layers.1.self_attn.q_proj", "layers.1.Wqkv"]
)
def test_a_name_is_read_and_written_alike(name: str) -> None:
    assert str(Unit.parse(name)) == name
    assert Unit.parse(Unit.parse(name).short) == Unit.parse(name)
    assert Unit.is_name(name)


@pytest.mark.parametrize(
    "name", ["", "layers", "layers.", "layers.-1", "layers.01", "3.", "3.1down", "3.a..b", "3.a.", "٣", "head"]
)
def test_another_spelling_is_refused_with_its_value(name: str) -> None:
    with pytest.raises(ConfigError, match="such as 3 or 3.down"):
        Unit.parse(name)
    assert not Unit.is_name(name)


def test_layers_and_parts() -> None:
    assert Unit(3, "down").whole == Unit(3) == Unit.parse("3")
    assert Unit(3).part("qkv") == Unit(3, "qkv")


@pytest.mark.parametrize(
    ("name", "layer", "group"),
    [
        ("layers.3", True, False),
        ("layers.3.down", False, True),
        ("layers.3.self_attn.q_proj", False, True),
        ("3", False, False),
        ("head", False, False),
        ("layers.x", False, False),
    ],
)
def test_what_a_plan_names_is_a_layer_a_group_or_something_around_them(name: str, layer: bool, group: bool) -> None:
    assert (Unit.is_layer(name), Unit.is_group(name)) == (layer, group)
