"""The longest input, by the config alone."""

from __future__ import annotations

import sys

import pytest

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.context import SMALLEST_CONTEXT, check_context, longest_input


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_every_key_counts_in_the_text_decoder_too(key: str) -> None:
    assert longest_input({key: 64}) == 64
    assert longest_input({"text_config": {key: 64}}, 1024) == 64
    assert longest_input({"max_position_embeddings": 128, "text_config": {key: 64}}) == 64


def test_a_config_without_a_length_takes_the_default_or_is_unbounded() -> None:
    assert longest_input({}, 1024) == 1024
    assert longest_input({"max_position_embeddings": None, "seq_length": 12}) == sys.maxsize


def test_too_few_positions_are_refused_by_number() -> None:
    assert check_context("m", SMALLEST_CONTEXT) == SMALLEST_CONTEXT
    with pytest.raises(UnsupportedModelError, match="m: takes 3 tokens at once, too few to measure or to calibrate"):
        check_context("m", 3)
