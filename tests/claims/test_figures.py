from __future__ import annotations

import pytest

from quant_fairness_plugin.claims.figures import find, labelled, written
from quant_fairness_plugin.errors import ConfigError

DOCUMENT = {
    "result": {
        "rows": [
            {"kept": "first, last", "kl": {"estimate": 0.25, "low": 0.2, "high": 0.3}},
            {"kept": "nothing", "kl": {"undefined": "collapsed"}},
        ]
    },
    "rankings": {"protect-one worst": ["layers.0"]},
}


def test_answers_are_found_by_key_number_and_field() -> None:
    assert find(DOCUMENT, "result.rows[kept=first, last].kl.estimate; result.rows[1].kept") == [0.25, "nothing"]
    assert find(DOCUMENT, "rankings.protect-one worst; result.rows#") == [["layers.0"], 2]


@pytest.mark.parametrize("path", ["result.nothing", "result.rows[kept=all].kl", "result.rows[7]", "result.rows.kl"])
def test_a_place_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="nothing at 'result"):
        find(DOCUMENT, path)


def test_cells_say_what_their_figures_are() -> None:
    path = "result.rows[kept=first, last].kl; result.rows[kept=nothing].kl"
    assert labelled(path, find(DOCUMENT, path)) == "kl: first, last 0.25 [0.2, 0.3]; nothing undefined"
    assert labelled("a.bytes_; a.label", [12, "good"]) == "bytes 12; label good"
    assert written({"low": 1.0, "high": 2.5}) == "low 1, high 2.5"
    assert written(True) == "True"
