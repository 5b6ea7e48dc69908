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
        ({"method": "magic"}, "method 'magic': Input should be 'rtn' or 'gptq'"),
        ({"protect_layers": "most"}, "protect_layers 'most': Input should be 'auto' or 'none'"),
        ({"max_overhead": -0.1}, r"max_overhead -0\.1 is no share"),
        ({"draws": 10}, "draws 10 are too few"),
        ({"colour": 1}, "known names: method, bits"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**chosen)
