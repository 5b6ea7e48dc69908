"""A decoder inside another model is measured, swept and quantized as it is alone: the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from quant_fairness_plugin.artifacts import Bootstrap, Grid, SweepReport
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.execution import Execution
from tests.planning import quantize_layers
from tests.planted_model import planted_texts
from tests.tiny import byte_tokenizer

GRID = Grid(group_size=32)


@pytest.fixture(scope="module")
def wrapped(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted Llama with a vision tower beside it."""
    folder = tmp_path_factory.mktemp("wrapped")
    text = LlamaConfig.from_pretrained(planted_model)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16,
    }  # fmt: skip
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision, image_token_index=263)
    model = LlavaForConditionalGeneration(config)
    plain = LlamaForCausalLM.from_pretrained(planted_model, dtype=torch.float32)
    model.model.language_model.load_state_dict(plain.model.state_dict())
    model.lm_head.load_state_dict(plain.lm_head.state_dict())
    model.to(torch.float16)  # type: ignore[arg-type] # Transformers types `to` as a method
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def sweep(loaded: LoadedModel, budget: int | None = None) -> SweepReport:
    texts = planted_texts().part("search").take(range(4))
    execution = Execution(memory_budget=budget)
    return sweep_units(loaded, texts, SweepConfig(), bootstrap=Bootstrap(draws=100), grid=GRID, execution=execution)


def test_a_sweep_finds_the_same_in_memory_and_from_files(planted_model: Path, wrapped: Path) -> None:
    expected = sweep(load_model(str(planted_model)))
    for found in (sweep(load_model(str(wrapped))), sweep(open_streamed(str(wrapped)), budget=10**9)):
        assert found.scores.keys() == expected.scores.keys()
        for plan, scores in expected.scores.items():
            for language, own in scores.languages.items():
                ours = found.scores[plan].languages[language]
                assert ours.tokens == own.tokens
                # Float32 additions in another order over four blocks, where scores are hundreds of nats.
                assert ours.nll_nats == pytest.approx(own.nll_nats, abs=1e-3)
        whole = {precision for precision in expected.layer_bytes if "." not in precision}  # not of single units
        assert {key: found.layer_bytes[key] for key in whole} == {key: expected.layer_bytes[key] for key in whole}


def test_gptq_finds_the_same_integers(planted_model: Path, wrapped: Path) -> None:
    calibration = build_calibration(byte_tokenizer(), planted_texts().part("calibrate"), row_tokens=32)
    plain, inside = (
        quantize_layers(load_model(str(folder)), (1,), grid=GRID, method="gptq", calibration=calibration)
        for folder in (planted_model, wrapped)
    )
    assert len(plain.tensors) == len(inside.tensors) == 21
    for name, tensor in plain.tensors.items():
        other = inside.tensors[name.replace("model.layers", "model.language_model.layers")]
        assert torch.equal(other.integers, tensor.integers)
        assert torch.equal(other.scales, tensor.scales)
