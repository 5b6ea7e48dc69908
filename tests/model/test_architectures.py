"""An architecture is one record: what it says holds for the loaded model and for the headers of its files alike."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quant_fairness_plugin.checkpoint.module_map import module_map, stored_name
from quant_fairness_plugin.model import architectures
from quant_fairness_plugin.model.architectures import (
    Architecture,
    Block,
    find_architecture,
    known_families,
    match_architecture,
)
from quant_fairness_plugin.model.context import POSITION_KEYS
from quant_fairness_plugin.model.load import load_model
from quant_fairness_plugin.model.outline import outline_model
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.preflight import known_units
from quant_fairness_plugin.quantize.folding import model_folds
from tests.model.test_outline import edit_config, rename_tensors
from tests.tiny import FAMILIES, byte_tokenizer, tiny_config, write_tiny_model


class ToyConfig(LlamaConfig):
    """Llama's, under another name, which Transformers' mapping of models does not hold."""

    model_type = "toy"


class ToyForCausalLM(LlamaForCausalLM):
    """Llama with a norm between the two halves of its MLP, which no known family has."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.mlp.down_proj = nn.Sequential()
            block.mlp.down_proj.inner_norm = nn.LayerNorm(config.intermediate_size)
            block.mlp.down_proj.linear = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.post_init()


def toy_record() -> Architecture:
    llama = find_architecture("llama")
    assert llama is not None
    down = replace(llama.units[-1], modules=("mlp.down_proj.linear",))
    return replace(
        llama,
        families=("toy",),
        units=(*llama.units[:-1], down),
        norms=llama.norms | {"mlp.down_proj.inner_norm"},
        folds=(*llama.folds[:-1], replace(llama.folds[-1], source="mlp.down_proj.inner_norm")),
        head_on_disk="toy_out",
        default_positions=77,
    )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tiny model of the toy architecture."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "toy", ToyConfig)
    mapping = AutoModelForCausalLM._model_mapping
    monkeypatch.setitem(mapping._extra_content, ToyConfig, ToyForCausalLM)
    torch.manual_seed(0)
    sizes = tiny_config("llama", layers=3, width=32).to_dict()
    model = ToyForCausalLM(ToyConfig(**{name: value for name, value in sizes.items() if name != "model_type"}))
    model.half().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def register(monkeypatch: pytest.MonkeyPatch, record: Architecture) -> None:
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*architectures.ARCHITECTURES, record))


def test_without_its_record_the_toy_is_traced(toy: Path) -> None:
    loaded = load_model(str(toy))
    assert (loaded.family.name, loaded.family.generic) == ("toy", False)
    assert loaded.family.unit_names == ("qkv", "o", "gate_up", "mlp.down_proj.linear")
    assert model_folds(loaded)["mlp.down_proj.linear"].source == "mlp.down_proj.inner_norm"
    assert outline_model(resolve_model(str(toy))).family == loaded.family
    assert known_units("toy") is None


def test_one_record_makes_an_architecture_a_full_member(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, toy_record())
    loaded = load_model(str(toy))
    family = loaded.family
    assert (family.name, family.architecture) == ("toy", toy_record())
    assert "toy" in known_families()
    assert known_units("toy") == ("qkv", "o", "gate_up", "down")
    assert family.modules(2)[-1] == "mlp.down_proj.linear"
    assert family.full_names(2)[-1] == "model.layers.2.mlp.down_proj.linear"
    assert tuple(family.fused_modules(1)) == ("model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj")
    assert {unit: fold.source for unit, fold in model_folds(loaded).items()} == {
        "qkv": "input_layernorm",
        "gate_up": "post_attention_layernorm",
        "down": "mlp.down_proj.inner_norm",
    }
    modules = module_map(loaded.model, family, family.full_names(0))
    assert set(modules.fused) == {name for layer in range(3) for name in family.fused_modules(layer)}
    assert stored_name("lm_head.weight", family) == "toy_out.weight"
    assert modules.aliases == ("toy_out",)


def test_headers_alone_show_the_same_member(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, toy_record())
    loaded = load_model(str(toy))
    rename_tensors(toy, "lm_head.", "toy_out.")
    edit_config(toy, max_position_embeddings=None)
    # Nothing is built: the headers are enough.
    monkeypatch.setattr("quant_fairness_plugin.model.outline._built", lambda *_: pytest.fail("built the model"))
    outline = outline_model(resolve_model(str(toy)))
    assert outline.family == loaded.family
    assert outline.shapes == {name: tuple(p.shape) for name, p in loaded.model.named_parameters()}
    assert (outline.width, outline.vocabulary, outline.positions) == (32, 264, 77)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_record_is_whole(family: str) -> None:
    record = find_architecture(family)
    assert record is not None
    units = {unit.name: unit for unit in record.units}
    assert len(set(record.modules)) == len(record.modules)
    for fold in record.folds:
        assert fold.unit in units
        assert fold.source in record.norms | set(record.modules)
        assert not (fold.activated and fold.source in record.norms)
    assert set(record.gguf_names) in (set(), set(record.modules))
    assert record.loaded_name(record.stored_name("lm_head.weight")) == "lm_head.weight"
    assert record.stored_name("lm_headless.weight") == "lm_headless.weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_input_is_what_the_config_says_else_the_record(family: str) -> None:
    record = find_architecture(family)
    assert record is not None
    assert record.longest_input({}) == (1024 if family == "gpt2" else sys.maxsize)
    for key in POSITION_KEYS:
        assert record.longest_input({key: 12}) == 12


def test_no_family_has_two_records() -> None:
    assert len(set(known_families())) == len(known_families())
    assert find_architecture("never-seen") is None


def test_the_model_type_picks_only_among_equals() -> None:
    llama = find_architecture("llama")
    assert llama is not None
    block = Block(llama.modules, frozenset(), frozenset(llama.modules), llama.norms, frozenset())

    def family_of(model_type: str, block: Block) -> str:
        record = match_architecture(lambda record: block if record.blocks == llama.blocks else None, model_type)
        assert record is not None
        return record.family_name(model_type)

    names = {name: family_of(name, block) for name in ("gemma", "mistral", "qwen2", "never-seen")}
    assert names == {"gemma": "gemma", "mistral": "mistral", "qwen2": "llama", "never-seen": "llama"}
    assert family_of("gemma", replace(block, biased=frozenset(llama.units[0].modules))) == "qwen2"


def save(folder: Path, config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # when it is imported
@pytest.mark.parametrize("multi_query", [True, False])
def test_headers_tell_linear_modules_from_conv1d_of_the_same_names(multi_query: bool, tmp_path: Path) -> None:
    config = GPTBigCodeConfig(
        vocab_size=264, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=64, multi_query=multi_query
    )
    save(tmp_path, config)
    loaded, outline = load_model(str(tmp_path)), outline_model(resolve_model(str(tmp_path)))
    assert (loaded.family.name, loaded.family.conv1d) == ("gpt_bigcode", False)
    assert outline.family == loaded.family


def test_headers_of_blocks_that_differ_are_not_taken_for_those_of_the_first(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama", layers=3)
    shapes = outline_model(resolve_model(str(tmp_path))).shapes
    assert "model.layers.2.mlp.up_proj.weight" in shapes
    rename_tensors(tmp_path, "model.layers.2.mlp.up_proj.", "model.layers.2.mlp.other_proj.")
    built: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quant_fairness_plugin.model.outline._built", lambda files, _: built.append(files.name))
        outline_model(resolve_model(str(tmp_path)))
    assert built == [tmp_path.name]


def test_a_file_without_the_embedding_is_read_by_the_model_itself(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "gemma")
    expected = load_model(str(tmp_path)).family
    rename_tensors(tmp_path, "model.embed_tokens.", "lm_head.")
    assert load_model(str(tmp_path)).family == expected
    outline = outline_model(resolve_model(str(tmp_path)))
    assert outline.family == expected
    assert outline.vocabulary == 264
