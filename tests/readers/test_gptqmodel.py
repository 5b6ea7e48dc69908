"""Our `gptq` checkpoints in real gptqmodel: the right modules quantized, and the numbers of our own dequantizer."""

from __future__ import annotations

import pytest

from tests.readers.checkpoints import LAYERS, PROTECTED, TOLERANCE, Reading, read_checkpoint

pytestmark = pytest.mark.readers

LINEARS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    return read_checkpoint("tiny", "gptq", "gptqmodel", tmp_path_factory.mktemp("gptqmodel"))


def test_only_the_protected_layer_is_in_16_bit(reading: Reading) -> None:
    in_16_bit = {name for name, method in reading.methods.items() if method == "Linear"}
    assert set(reading.methods) == {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS} | {"lm_head"}
    assert in_16_bit == {f"model.layers.{PROTECTED}.{name}" for name in LINEARS} | {"lm_head"}


def test_log_probabilities_are_those_of_our_dequantizer(reading: Reading) -> None:
    assert reading.own_distance < TOLERANCE


def test_a_reader_that_mixed_up_layers_would_be_noticed(reading: Reading) -> None:
    assert reading.mistaken_distance > TOLERANCE
