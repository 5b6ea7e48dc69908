"""An architecture without a record is exported, or refused before anything of the model itself is quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.export.trial import is_known, try_architecture
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.model.small import small_model
from quant_fairness_plugin.steps import format_problems
from tests.export.build import TEXTS
from tests.tiny import byte_tokenizer
from tests.traced import traced_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

IDS = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0}
SMALL = IDS | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
GPT = IDS | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "phi": SMALL, "stablelm": SMALL, "cohere": SMALL, "starcoder2": SMALL, "olmo": SMALL, "persimmon": SMALL,
    "gptj": GPT | {"rotary_dim": 16}, "codegen": GPT | {"rotary_dim": 16, "n_ctx": 128},
    "mpt": IDS | {"d_model": 64, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 128},
    "gpt_neo": IDS | {
        "hidden_size": 64, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]],
    },
    "xglm": IDS | {"d_model": 64, "ffn_dim": 128, "num_layers": 3, "attention_heads": 4, "pad_token_id": 1},
    "biogpt": SMALL | {"pad_token_id": 1},
}  # fmt: skip
UNREAD: dict[str, dict[str, Any]] = {
    "falcon": SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt_bigcode": GPT,
}
"""Transformers cannot load these quantized: it initializes weights that its quantized modules no longer have."""
GRID = Grid(group_size=32)


def build(model_type: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))


def attempt(model: Any, form: Any = "compressed-tensors") -> None:
    try_architecture(model, byte_tokenizer(), texts=TEXTS, format=form, reader="transformers", grid=GRID)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_small_model_goes_the_whole_way(model_type: str) -> None:
    model = build(model_type, FAMILIES[model_type])
    assert not is_known(model)
    before = torch.get_rng_state()
    attempt(model)
    assert torch.equal(torch.get_rng_state(), before)
    small = small_model(model)
    assert small is not None
    found, expected = detect_family(small), detect_family(model)
    assert set(found.kinds) == set(expected.kinds)
    assert replace(found, kinds=()) == replace(expected, kinds=())
    assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in model.parameters())


def test_the_small_model_of_a_hybrid_has_every_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of linear attention alone would fail in a reader that asks the attention's cache for its length."""
    depths: list[int] = []
    made = small_model
    monkeypatch.setattr(
        "quant_fairness_plugin.export.trial.small_model",
        lambda model, *, least: depths.append(least) or made(model, least=least),
    )
    attempt(traced_model("qwen3_5_text", layers=8))
    assert depths == [4]


@pytest.mark.parametrize("model_type", UNREAD)
def test_what_the_reader_cannot_load_is_refused_with_its_reason(model_type: str) -> None:
    model = build(model_type, UNREAD[model_type])
    message = rf"{model_type}: an architecture without a record.*has no attribute 'weight'.*Use --format fp16-twin"
    with pytest.raises(UnsupportedModelError, match=message):
        attempt(model)
    attempt(model, "fp16-twin")


def test_a_known_family_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant_fairness_plugin.export.trial.small_model", lambda model: pytest.fail("tried"))
    attempt(build("llama", SMALL))


@pytest.mark.parametrize("model_type", ["falcon", "gpt_bigcode", "cohere"])
def test_plan_and_quantize_say_the_same_before_the_work(tmp_path: Path, model_type: str) -> None:
    folder = tmp_path / model_type
    build(model_type, (FAMILIES | UNREAD)[model_type]).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    files = resolve_model(str(folder))
    config = FairConfig(group_size=32, languages=("en", "he"), protect_layers="none")
    problems = format_problems(files, TEXTS, config, ("compressed-tensors", "fp16-twin"))
    assert outline_model(files).family == load_model(str(folder)).family
    steps: list[str] = []
    quantizer = FairQuantizer.from_pretrained(folder, config=config, progress=lambda step, *_: steps.append(step))
    if model_type == "cohere":
        assert problems == {}
        return
    with pytest.raises(UnsupportedModelError) as caught:
        quantizer.save_pretrained(tmp_path / "out")
    assert problems == {"compressed-tensors": str(caught.value)}
    assert set(steps) == {"load"}


def test_activations_beyond_float16_are_refused_where_readers_compute_in_it(tmp_path: Path) -> None:
    model = build("llama", SMALL).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[7] = 1e8
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    options: dict[str, Any] = {"group_size": 32, "languages": ("en", "he"), "protect_layers": "none", "method": "rtn"}
    steps: list[str] = []
    quantizer = FairQuantizer.from_pretrained(
        tmp_path / "m", progress=lambda step, *_: steps.append(step), format="awq", **options
    )
    with pytest.raises(UnsupportedModelError, match="readers of awq compute in float16.*--format compressed-tensors"):
        quantizer.save_pretrained(tmp_path / "out")
    assert set(steps) == {"load"}
