from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.module_map import module_map, own_widths
from quant_fairness_plugin.checkpoint.readers import find_refusal
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.preflight import ModelSource
from quant_fairness_plugin.quantize.workplace import Workplace
from tests.export.build import TEXTS, quantize_tiny
from tests.tiny import MIXTURES

Model = Callable[..., Path]
IDS = torch.arange(3, 40)[None]
STACKS = ("gate_up_proj", "down_proj")


def write(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    export(quantize_tiny(folder, **options), out, texts=TEXTS)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


@pytest.fixture(scope="module")
def written(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Twelve layers, of which layer 1 keeps 16 bit: not 10 and 11, whose names begin alike."""
    root = tmp_path_factory.mktemp("mixtures")

    def build(family: str) -> Path:
        out = root / family
        if not out.exists():
            write(tiny_model(family, layers=12), out)
        return out

    return build


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "qwen3_next", "hy_v3", "qwen3_5_moe"])
def test_a_mixture_that_stays_in_its_files_gives_the_same_bytes(tiny_model: Model, tmp_path: Path, family: str) -> None:
    """Layer 1 keeps 16 bit, so that its experts are stacked in the file."""
    folder, config = tiny_model(family, layers=3), FairConfig(group_size=32, method="rtn", protect_layers=(1,))
    weights = []
    for name, place in {"whole": None, "in blocks": Workplace(memory_budget=1 << 26)}.items():
        quantizer = FairQuantizer.from_source(ModelSource(str(folder)), config, place=place)
        quantizer.save_pretrained(tmp_path / name, measure=None)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_transformers_computes_what_the_files_say(written: Callable[[str], Path], family: str) -> None:
    folder = written(family)
    dense = load_dense_model(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    experts = dict(model.named_parameters())
    for name, value in dense.named_parameters():
        if ".experts." in name:
            # Transformers unpacks experts while loading, into the storage dtype.
            assert torch.equal(experts[name].float(), value.half().float()), name
            assert torch.equal(value, value.half().float()) == (".layers.1." in name), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_kept_experts_are_stacked_and_others_lie_one_by_one(written: Callable[[str], Path], family: str) -> None:
    names = set(load_file(written(family) / "model.safetensors"))
    place, first = ("block_sparse_moe", "w1") if family == "mixtral" else ("mlp", "gate_proj")
    assert f"model.layers.1.{place}.experts.gate_up_proj" in names
    assert not any(name.startswith(f"model.layers.1.{place}.experts.0.") for name in names)
    for layer in (0, 10, 11):
        assert f"model.layers.{layer}.{place}.experts.3.{first}.weight_packed" in names
        assert f"model.layers.{layer}.{place}.experts.gate_up_proj" not in names


def test_lists_fit_the_names_of_transformers_and_of_servers(written: Callable[[str], Path]) -> None:
    config = json.loads((written("mixtral") / "config.json").read_text())["quantization_config"]
    assert config["ignore"][-2:] == [
        r"re:.*\.gate$",
        r"re:model\.layers\.1\.(mlp|block_sparse_moe)\.experts\..*",
    ]
    assert "model.layers.1.self_attn.q_proj" in config["ignore"]
    assert not any("experts.0" in entry for entry in config["ignore"])


@pytest.mark.parametrize("family", [name for name in MIXTURES if name not in ("qwen3_moe", "mixtral")])
def test_the_other_families_are_read_back(tiny_model: Model, tmp_path: Path, family: str) -> None:
    """`export` compares the logits of Transformers with those of our own dequantizer."""
    overrides: dict[str, Precision] = {"layers.1.experts": "fp16", "layers.1.o": "int8"}
    source = tiny_model(family, layers=3)
    config = write(source, tmp_path / "out", protected=(), overrides=overrides)
    first = next(iter(config["config_groups"].values()))
    assert first["targets"] == [r"re:.*\.experts\.\d+\..*"]
    assert first["weights"]["num_bits"] == 4
    names, stored = (set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "out", source))
    kept = {name for name in stored if ".layers.1." in name and re.search(r"\.experts\.\d+\.", name)}
    stacks = {re.sub(r"\.experts\..*", f".experts.{part}", name) for name in kept for part in STACKS}
    plain = {name.removesuffix("_packed") for name in names if not name.endswith(("_scale", "_shape"))}
    assert plain == stored - kept | stacks, "names on disk are those of the source"
    quantized = {name.removesuffix(".weight_packed") for name in names if name.endswith("_packed")}
    assert not any(re.search(r"(\.gate|router|expert_gate|indexer)(\.|$)", name) for name in quantized)


@pytest.mark.parametrize("damage", ["one by one", "left out"])
def test_kept_experts_that_transformers_would_leave_random_are_found(
    tiny_model: Model, tmp_path: Path, damage: str
) -> None:
    write(tiny_model("qwen3_moe", layers=2), tmp_path / "out")
    (tmp_path / "out" / "quant_fairness.json").unlink()  # as another tool would have written it
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    down = tensors.pop("model.layers.1.mlp.experts.down_proj")
    if damage == "one by one":
        tensors |= {f"model.layers.1.mlp.experts.{i}.down_proj.weight": m.clone() for i, m in enumerate(down)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing.*model\.layers\.1\.mlp\.experts\.down_proj"):
        verify(tmp_path / "out")


def test_a_plain_checkpoint_holds_experts_one_by_one(tiny_model: Model, tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_model("mixtral"))
    export(quantized, tmp_path / "out", texts=TEXTS, format="fp16-twin")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in names
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in names
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "gptq"}, "format 'gptq' holds no experts of mixtral that Transformers reads"),
        ({"format": "awq"}, "format 'awq' holds no experts of mixtral that Transformers reads"),
        ({"grid": Grid(symmetric=False)}, "no place for their zero points"),
        ({"overrides": {"layers.3": "int8"}}, "experts of mixtral in INT8 or in groups of their own are not read"),
        (
            {"overrides": {"layers.3.experts": "int8"}},
            "experts of mixtral in INT8 or in groups of their own are not read",
        ),
    ],
)
@pytest.mark.parametrize("reader", ["transformers", "vllm", None])
def test_what_no_reader_takes_is_refused(options: dict[str, Any], reason: str, reader: str | None) -> None:
    wanted = {"format": "compressed-tensors", "grid": Grid(), "reader": reader} | options
    refusal = find_refusal("mixtral", **wanted)
    assert refusal is not None
    assert reason in refusal.reason
    assert find_refusal("llama", **(wanted | {"format": "compressed-tensors", "reader": None})) is None


@pytest.mark.parametrize("name", ["layers.1", "layers.1.experts"])
def test_readers_are_refused_where_they_were_not_right(name: str) -> None:
    kept: dict[str, Precision] = {name: "fp16"}
    wanted: dict[str, Any] = {"format": "compressed-tensors", "grid": Grid()}
    refusal = find_refusal("mixtral", reader="vllm", overrides=kept, **wanted)
    assert refusal is not None
    assert "computes NaN" in refusal.reason
    assert find_refusal("mixtral", reader="vllm", **wanted) is None
    assert find_refusal("qwen3_moe", reader="vllm", overrides=kept, **wanted) is None
    assert find_refusal("mixtral", reader="transformers", overrides=kept, **wanted) is None
    for reader in ("gptqmodel", "sglang"):
        assert "was not run on quantized experts" in str(find_refusal("qwen3_moe", reader=reader, **wanted))
        assert "was not run on quantized experts" not in str(find_refusal("qwen3", reader=reader, **wanted))


def test_int8_beside_experts_is_written() -> None:
    overrides: dict[str, Precision] = {"layers.3.qkv": "int8", "layers.4.experts": "fp16"}
    assert find_refusal("qwen3_moe", format="compressed-tensors", grid=Grid(), overrides=overrides) is None


def test_experts_that_would_be_unpacked_with_other_bits_are_found(tiny_model: Model) -> None:
    quantized = quantize_tiny(tiny_model("qwen3_moe"), protected=(), overrides={"layers.1.o": "int8"})
    loaded, layout = quantized.loaded, checkpoint_format("compressed-tensors")
    bits = own_widths({name: tensor.grid.bits for name, tensor in quantized.tensors.items()})
    modules = module_map(loaded.model, loaded.family, quantized.tensors, bits=bits)
    config = layout.quantization_config(modules, quantized.grid)
    assert list(layout.scheme_problems(modules, config)) == []
    del config["config_groups"]["experts"]  # Transformers then takes the group of the INT8 modules, which comes first
    assert list(layout.scheme_problems(modules, config)) == ["num_bits is 8; expected: 4"]
