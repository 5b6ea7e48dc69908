"""What formats write: metadata for every loader's own rule, and tensors that read back exactly."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid, Precision
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.formats.format import StoredGrid
from quant_fairness_plugin.checkpoint.module_map import ModuleMap
from quant_fairness_plugin.checkpoint.readers import check_exportable, find_refusal
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.families import Family
from quant_fairness_plugin.quantize.grid import quantize_rtn
from tests.export.build import llama_map


def family_of(name: str) -> Family:
    """The map of a family with a record, or of blocks like Llama's of which nothing else is known."""
    record = find_architecture("llama" if name == "generic" else name)
    assert record is not None
    return Family(name, replace(record, families=()) if name == "generic" else record, tied_head=False)


LLAMA = family_of("llama")


@pytest.mark.parametrize(
    ("name", "bits"), [("compressed-tensors", 4), ("gptq", 4), ("awq", 4), ("compressed-tensors", 8), ("gptq", 8)]
)
@pytest.mark.parametrize(("rows", "cols", "group"), [(8, 32, 32), (24, 64, 32), (16, 128, 64), (40, 72, -1)])
def test_read_back_returns_the_quantized_module(name: str, bits: int, rows: int, cols: int, group: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    grid = Grid(bits=bits, group_size=group)
    tensor = quantize_rtn(torch.randn(rows, cols, generator=generator), grid, scale_dtype=torch.float16)
    layout = checkpoint_format(name)
    stored = layout.tensors("a.b", tensor)
    assert f"a.b.{layout.suffixes[0]}" in stored
    back = layout.read_back("a.b", stored, grid)
    assert torch.equal(back.integers, tensor.integers)
    assert torch.equal(back.scales, tensor.scales)
    assert torch.equal(back.zeros, tensor.zeros)
    assert back.grid == grid


@pytest.mark.parametrize(("name", "rows"), [("compressed-tensors", 17), ("awq", 24)])
def test_asymmetric_zero_points_read_back(name: str, rows: int) -> None:
    grid = Grid(group_size=32, symmetric=False)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.rand(rows, 64, generator=generator) + 0.5 * torch.randn(rows, 1, generator=generator)
    tensor = quantize_rtn(weight, grid, scale_dtype=torch.bfloat16)
    assert len(tensor.zeros.unique()) > 2
    layout = checkpoint_format(name)
    assert torch.equal(layout.read_back("m", layout.tensors("m", tensor), grid).zeros, tensor.zeros)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_width_that_does_not_fill_words_is_refused(name: str) -> None:
    tensor = quantize_rtn(torch.randn(12, 32), Grid(group_size=32), scale_dtype=torch.float16)
    with pytest.raises(UnsupportedModelError, match=rf"a\.b is \[12, 32\]; {name}.*compressed-tensors"):
        checkpoint_format(name).tensors("a.b", tensor)


def test_awq_refuses_8_bits() -> None:
    tensor = quantize_rtn(torch.randn(8, 32), Grid(bits=8, group_size=32), scale_dtype=torch.float16)
    with pytest.raises(UnsupportedModelError, match=r"a\.b has 8 bits; awq checkpoints hold 4 only"):
        checkpoint_format("awq").tensors("a.b", tensor)


def test_compressed_tensors_metadata_is_exactly_this() -> None:
    modules = llama_map(layers=2, kept=(1,))
    config = checkpoint_format("compressed-tensors").quantization_config(modules, Grid(group_size=64))
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                    "dynamic": False,
                    "actorder": None,
                },
            }
        },
        "ignore": [
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.k_proj",
            "model.layers.1.self_attn.v_proj",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.gate_proj",
            "model.layers.1.mlp.up_proj",
            "model.layers.1.mlp.down_proj",
            "lm_head",
        ],
    }
    assert checkpoint_format("compressed-tensors").side_files(modules, Grid(group_size=64)) == {}


def test_one_scale_per_channel_is_the_channel_strategy() -> None:
    config = checkpoint_format("compressed-tensors").quantization_config(llama_map(), Grid(group_size=-1))
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)


def test_8_bit_modules_are_a_group_of_their_own_named_in_full() -> None:
    modules = llama_map(layers=3, kept=(1,), int8=(2,))
    config = checkpoint_format("compressed-tensors").quantization_config(modules, Grid(group_size=64))
    groups = config["config_groups"]
    assert list(groups) == ["group_1", "group_0"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_1"]["targets"] == [name for name in modules.quantized if ".layers.2." in name]
    assert groups["group_1"]["weights"] == groups["group_0"]["weights"] | {"num_bits": 8}


def test_8_bit_modules_have_gptq_rules_under_every_name() -> None:
    modules = llama_map(layers=12, kept=(1,), int8=(10,))
    config = checkpoint_format("gptq").quantization_config(modules, Grid(group_size=32))
    rules = {rule: change for rule, change in config["dynamic"].items() if change}
    assert set(rules) == {
        rf"+:^model\.layers\.10\.{part}$"
        for part in (
            r"self_attn\.q_proj", r"self_attn\.k_proj", r"self_attn\.v_proj", r"self_attn\.qkv_proj",
            r"self_attn\.o_proj", r"mlp\.gate_proj", r"mlp\.up_proj", r"mlp\.gate_up_proj", r"mlp\.down_proj",
        )
    }  # fmt: skip
    assert all(change == {"bits": 8} for change in rules.values())
    assert config["bits"] == 4
    assert config["modules_in_block_to_quantize"] == [list(modules.quantized)]


def test_awq_metadata_names_modules_for_every_loader() -> None:
    modules = replace(llama_map(layers=12, kept=(1,)), renamed={"lm_head": "embed_out"})
    layout = checkpoint_format("awq")
    config = layout.quantization_config(modules, Grid(symmetric=False))
    prefix = "model.layers.1"
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "checkpoint_format": "gemm",
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "modules_to_not_convert": [
            f"{prefix}.self_attn.q_proj", f"{prefix}.self_attn.k_proj", f"{prefix}.self_attn.v_proj",
            f"{prefix}.self_attn.o_proj", f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj",
            f"{prefix}.mlp.down_proj", "lm_head", "embed_out",
            f"{prefix}.self_attn.qkv_proj", f"{prefix}.mlp.gate_up_proj",
        ],
        "dynamic": {r"-:^model\.layers\.1\..*": {}},
    }  # fmt: skip
    # Readers take the zero points from the file on a symmetric grid too.
    assert layout.quantization_config(modules, Grid()) == config
    assert layout.side_files(modules, Grid()) == {"quantize_config.json": config}


def test_gptq_metadata_names_modules_for_every_loader() -> None:
    modules = llama_map(layers=12, kept=(1,))
    layout = checkpoint_format("gptq")
    config = layout.quantization_config(modules, Grid())
    assert config["dynamic"] == {r"-:^model\.layers\.1\..*": {}}
    assert config["modules_in_block_to_quantize"] == [list(modules.quantized)]
    assert config["modules_to_not_convert"] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
    ]
    rest = {key: value for key, value in config.items() if not key.startswith("modules") and key != "dynamic"}
    assert rest == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert layout.side_files(modules, Grid()) == {"quantize_config.json": config}


def test_a_single_kept_module_gets_a_rule_of_its_own() -> None:
    modules = llama_map(layers=2, kept=(), also_kept=("model.layers.0.mlp.down_proj",))
    config = checkpoint_format("gptq").quantization_config(modules, Grid())
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.down_proj$": {}}


def test_a_kept_group_is_named_merged_too() -> None:
    gate_up = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    config = checkpoint_format("gptq").quantization_config(llama_map(layers=2, kept=(), also_kept=gate_up), Grid())
    assert list(config["modules_to_not_convert"]) == [*gate_up, "model.layers.0.mlp.gate_up_proj"]
    assert r"-:^model\.layers\.0\.mlp\.gate_up_proj$" in config["dynamic"]


def test_split_groups_are_found() -> None:
    modules = llama_map(layers=2, kept=(), also_kept=("model.layers.0.self_attn.k_proj",))
    assert modules.split_groups == ("model.layers.0.self_attn.qkv_proj",)
    assert llama_map(int8=(3,)).split_groups == ()
    mixed = replace(llama_map(layers=2, kept=()), bits={"model.layers.1.mlp.up_proj": 8})
    assert mixed.split_groups == ("model.layers.1.mlp.gate_up_proj",)


def test_kept_layers_are_those_without_any_quantized_module() -> None:
    modules = ModuleMap("b", quantized=("b.0.x", "b.2.x"), kept=("b.1.x", "b.0.y", "b.10.x", "head"), fused={})
    assert modules.kept_layers == ("b.1", "b.10")


def test_unknown_formats_are_refused() -> None:
    known = "compressed-tensors, gptq, awq, fp16-twin, gguf"
    with pytest.raises(ConfigError, match=f"unknown format 'onnx'; known are {known}"):
        checkpoint_format("onnx")


def test_the_twin_is_a_format_that_packs_nothing() -> None:
    twin = checkpoint_format("fp16-twin")
    assert not twin.packs
    assert twin.quantization_config(llama_map(), Grid()) == {}
    tensor = quantize_rtn(torch.randn(8, 32), Grid(group_size=32), scale_dtype=torch.float16)
    with pytest.raises(ConfigError, match="stores no quantized modules"):
        twin.tensors("a.b", tensor)


@pytest.mark.parametrize("reader", ["transformers", "vllm", "gptqmodel", None])
@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq", "awq", "fp16-twin"])
def test_a_llama_is_exportable_in_every_format_with_units_of_its_own(format_name: str, reader: str | None) -> None:
    overrides: dict[str, Precision] = {"layers.3.down": "fp16"}
    check_exportable(LLAMA, format=format_name, grid=Grid(), reader=reader, overrides=overrides)


@pytest.mark.parametrize(
    ("format_name", "reader", "precision", "message"),
    [
        ("compressed-tensors", "transformers", "int8", None),
        ("compressed-tensors", "vllm", "int8", None),
        ("gptq", "vllm", "int8", None),
        ("gptq", "gptqmodel", "int8", None),
        ("gptq", "transformers", "int8", "Transformers ignores them"),
        ("awq", "vllm", "int8", "holds 4-bit integers only"),
        ("awq", None, "int8", "holds 4-bit integers only"),
        ("compressed-tensors", "transformers", "int6", "layers of int6 are not written"),
        ("fp16-twin", "transformers", "int6", None),
    ],
)
def test_int8_layers_are_written_where_every_asked_reader_knows_them(
    format_name: str, reader: str | None, precision: Precision, message: str | None
) -> None:
    refusal = find_refusal(LLAMA, format=format_name, grid=Grid(), reader=reader, overrides={"layers.5": precision})
    assert (refusal is None) == (message is None)
    assert message is None or message in str(refusal)


def test_a_unit_of_an_unknown_architecture_cannot_have_a_precision_of_its_own() -> None:
    overrides: dict[str, Precision] = {"layers.3.mlp.up": "fp16"}
    with pytest.raises(UnsupportedModelError, match=r"layers\.3\.mlp\.up cannot have a precision of its own"):
        check_exportable(family_of("generic"), format="compressed-tensors", grid=Grid(), overrides=overrides)


def test_the_table_can_be_asked_by_name_and_before_the_model_is_known() -> None:
    by_name = find_refusal("gpt2", format="gptq", grid=Grid(), reader="transformers")
    whole = find_refusal(family_of("gpt2"), format="gptq", grid=Grid(), reader="transformers")
    assert by_name == whole
    assert by_name is not None
    assert find_refusal(None, format="gptq", grid=Grid(), reader="transformers") is None
    with pytest.raises(UnsupportedModelError, match="asymmetric"):
        check_exportable(None, format="gptq", grid=Grid(symmetric=False), reader="vllm")


@pytest.mark.parametrize(
    ("family", "format_name", "reader", "grid", "message"),
    [
        (
            "gpt2",
            "compressed-tensors",
            "transformers",
            Grid(),
            r"--reader vllm, or --format fp16",
        ),
        ("gpt2", "gptq", "transformers", Grid(), "does not load"),
        ("bloom", "compressed-tensors", "vllm", Grid(), "vLLM cannot load a quantized BLOOM"),
        ("bloom", "gptq", "vllm", Grid(), "vLLM cannot load a quantized BLOOM"),
        ("generic", "gptq", "vllm", Grid(), "merged module names of a known family"),
        ("llama", "gptq", "vllm", Grid(symmetric=False), "asymmetric"),
        ("llama", "compressed-tensors", "transformers", Grid(bits=3), "3 bits are not written"),
        ("llama", "gptq", "transformers", Grid(bits=8), "8 bits are not written"),
        ("generic", "awq", "vllm", Grid(), "merged module names of a known family"),
        ("llama", "awq", "vllm", Grid(bits=8), "8 bits are not written"),
    ],
)
def test_combinations_that_upstream_reads_wrongly_are_refused_with_a_way_out(
    family: str, format_name: str, reader: str, grid: Grid, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_exportable(family_of(family), format=format_name, grid=grid, reader=reader)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "generic"])
@pytest.mark.parametrize("grid", [Grid(), Grid(bits=3), Grid(symmetric=False)])
def test_the_plain_twin_is_always_exportable(family: str, grid: Grid) -> None:
    for reader in ("transformers", "vllm"):
        check_exportable(family_of(family), format="fp16-twin", grid=grid, reader=reader)


def test_sglang_reads_int8_layers_of_gptq_and_not_of_compressed_tensors() -> None:
    overrides: dict[str, Precision] = {"layers.5": "int8"}
    check_exportable(LLAMA, format="gptq", grid=Grid(), reader="sglang", overrides=overrides)
    with pytest.raises(UnsupportedModelError, match=r"as 4 bit; allowed is gptq\. Use --format gptq"):
        check_exportable(LLAMA, format="compressed-tensors", grid=Grid(), reader="sglang", overrides=overrides)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
@pytest.mark.parametrize(("rows", "cols", "group"), [(8, 32, 32), (24, 64, 32), (40, 72, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes_are_those_of_the_packed_tensors(name: str, rows: int, cols: int, group: int, symmetric: bool) -> None:
    layout = checkpoint_format(name)
    generator = torch.Generator().manual_seed(0)
    grid = Grid(group_size=group, symmetric=symmetric)
    tensor = quantize_rtn(torch.randn(rows, cols, generator=generator), grid, scale_dtype=torch.float16)
    stored = {key.removeprefix("m."): value for key, value in layout.tensors("m", tensor).items()}
    expected = StoredGrid(rows, cols, 4, tensor.scales.shape[1])
    assert layout.grid_of(stored) == expected
    assert layout.grid({suffix: tuple(value.shape) for suffix, value in stored.items()}, rows, cols) == expected
    dtypes = {torch.int32: "I32", torch.int64: "I64", torch.float16: None}
    kinds = {suffix: (dtypes[value.dtype], tuple(value.shape)) for suffix, value in stored.items()}
    assert layout.expected(expected, symmetric=symmetric) == kinds


def test_an_unknown_reader_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown reader 'llama.cpp'; known are transformers, vllm, gptqmodel, sg"):
        check_exportable(LLAMA, format="gptq", grid=Grid(), reader="llama.cpp")


def test_what_is_asked_at_plan_time_does_not_import_torch() -> None:
    modules = ("checkpoint.formats", "checkpoint.readers", "checkpoint.folder", "checkpoint.readers.sglang")
    modules += ("export.staging", "export.verify", "export.card")
    imports = ", ".join(f"quant_fairness_plugin.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
