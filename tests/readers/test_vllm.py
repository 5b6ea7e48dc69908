"""Our checkpoints in real vLLM (CPU build): the right modules quantized, and the numbers of our own dequantizer."""

from __future__ import annotations

import pytest
import torch

from tests.readers.checkpoints import LAYERS, PROTECTED, TOLERANCE, Reading, log_probabilities, read_checkpoint

pytestmark = pytest.mark.readers

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""vLLM's linear modules of a block: it merges those of a fusion group."""


@pytest.fixture(
    scope="module",
    params=[("tiny", "compressed-tensors"), ("tiny", "gptq"), ("demo", "compressed-tensors")],
    ids="-".join,
)
def reading(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reading:
    model, format = request.param
    return read_checkpoint(model, format, "vllm", tmp_path_factory.mktemp("vllm"))


def test_only_the_protected_layer_is_in_16_bit(reading: Reading) -> None:
    in_16_bit = {name for name, method in reading.methods.items() if method == "UnquantizedLinearMethod"}
    assert set(reading.methods) == {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in LINEARS}
    assert in_16_bit == {f"model.layers.{PROTECTED}.{name}" for name in LINEARS}


def test_log_probabilities_are_those_of_our_dequantizer(reading: Reading) -> None:
    assert reading.own_distance < TOLERANCE


def test_a_reader_that_mixed_up_layers_would_be_noticed(reading: Reading) -> None:
    assert reading.mistaken_distance > TOLERANCE


def test_greedy_tokens_are_ours_unless_two_are_equally_likely(reading: Reading) -> None:
    for sequence in reading.sequences:
        tokens = torch.tensor(sequence["ids"][-sequence["new"] :])
        own = log_probabilities(reading.dequantized, sequence["ids"])[-sequence["new"] - 1 : -1]
        behind = own.max(dim=1).values - own.gather(1, tokens[:, None])[:, 0]
        assert behind.max() < 2 * TOLERANCE * reading.unit
        assert (behind == 0).float().mean() >= 0.75
