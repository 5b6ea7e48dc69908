"""`export` writes what real loaders read, copies the rest byte for byte, and leaves nothing after a failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.artifacts import ExportRecord, Grid, Measurement, Precision, load
from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.checkpoint.formats import checkpoint_format
from quant_fairness_plugin.checkpoint.inspection import check_tensor_list, check_values, modules_by_tensors
from quant_fairness_plugin.errors import ArtifactError, ConfigError, ResourceError, UnsupportedModelError
from quant_fairness_plugin.export import writer
from quant_fairness_plugin.export.contents import checkpoint_tensors
from quant_fairness_plugin.export.shards import INDEX, write_shards
from quant_fairness_plugin.export.verify import CheckResult, VerifyReport, verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.headers import read_header
from quant_fairness_plugin.model.load import from_loaded, load_model
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.stream import quantize_model
from tests.export.build import ASYMMETRIC_READER, GRID, TEXTS, measurement, quantize_tiny
from tests.export.conftest import Exported, rewrite_json
from tests.planning import plan_of_layers, quantize_layers
from tests.tiny import tiny_config

PACKED_FORMATS = ("compressed-tensors", "gptq", "awq")
TRANSFORMERS_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox", "bloom")


@pytest.fixture
def small(tiny_model: Callable[..., Path]) -> QuantizedModel:
    return quantize_tiny(tiny_model("llama", layers=2))


def write(quantized: QuantizedModel, out: Path, **options: Any) -> ExportRecord:
    return export(quantized, out, texts=TEXTS, **options)


@pytest.mark.parametrize("family", TRANSFORMERS_FAMILIES)
def test_transformers_reads_it_with_layer_1_of_12_in_16_bit(exported: Exported, family: str) -> None:
    folder = exported(family)  # the export itself has compared the logits, before it gave the folder its name
    record = load(ExportRecord, folder / "quant_fairness.json")
    assert any(".10." in name for name in record.quantized_modules)
    assert any(".11." in name for name in record.quantized_modules)
    assert not any(".1." in name for name in record.quantized_modules)
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(".1." in name for name in ignored)
    assert not any(".10." in name or ".11." in name for name in ignored)


@pytest.mark.parametrize(
    ("format_name", "reader"), [("compressed-tensors", "transformers"), ("gptq", "vllm"), ("gptq", "transformers")]
)
def test_every_unit_is_written_with_its_own_group_size(
    tiny_model: Callable[..., Path], tmp_path: Path, format_name: str, reader: str
) -> None:
    """Of width 96 `down` has 192 input channels, groups of 64; all others have groups of 32."""
    wide: dict[str, Precision] = {} if (format_name, reader) == ("gptq", "transformers") else {"layers.2": "int8"}
    quantized = quantize_tiny(tiny_model("llama", layers=12, width=96), grid=Grid(), overrides=wide)
    record = write(quantized, tmp_path / "out", format=format_name, reader=reader)
    assert record.kept_modules == {}
    assert record.sizes == {name: 64 if "down" in name else 32 for name in record.quantized_modules}
    assert record.grids == "int4 g32 sym absmax · 11 of 77 modules g64"
    assert verify(tmp_path / "out").problems[reader] == ""
    rewrite_json(
        tmp_path / "out" / "quant_fairness.json",
        lambda content: content["group_sizes"].update({"model.layers.0.mlp.down_proj": 32}),
    )
    wrong = load(ExportRecord, tmp_path / "out" / "quant_fairness.json")
    shapes = read_header(tmp_path / "out" / "model.safetensors")
    model, family = quantized.loaded.model, quantized.loaded.family
    modules = modules_by_tensors(model, family, shapes, wrong)
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.down_proj\..* expected"):
        check_tensor_list(model, family, modules, shapes, wrong, "float16")


@pytest.mark.parametrize(("format_name", "reader"), [("awq", "vllm"), ("compressed-tensors", "sglang")])
def test_several_group_sizes_are_refused_where_one_is_read(
    tiny_model: Callable[..., Path], tmp_path: Path, format_name: str, reader: str
) -> None:
    quantized = quantize_tiny(tiny_model("llama", layers=2, width=96), grid=Grid(group_size=64))
    with pytest.raises(UnsupportedModelError, match="group size.*--group-size 32 for a plan of one size"):
        write(quantized, tmp_path / "out", format=format_name, reader=reader)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_the_twin_is_a_plain_checkpoint_with_the_dequantized_values(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    quantized = quantize_tiny(tiny_model(family, layers=2))
    record = write(quantized, tmp_path / "twin", format="fp16-twin")
    stored = load_file(tmp_path / "twin" / "model.safetensors")
    source = load_file(tiny_model(family, layers=2) / "model.safetensors")
    assert record.format == "fp16-twin"
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in source.items()}
    for name, weight in quantized.dense_weights().items():
        assert torch.equal(stored[f"{name}.weight"], weight.half())
    assert "quantization_config" not in json.loads((tmp_path / "twin" / "config.json").read_text())
    assert verify(tmp_path / "twin", reader="transformers").complete


def test_the_twin_may_have_any_width(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_model("llama", layers=2), grid=Grid(bits=3, group_size=32))
    write(quantized, tmp_path / "twin", format="fp16-twin")
    with pytest.raises(UnsupportedModelError, match="3 bits are not written"):
        write(quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_a_tied_head_stays_out_of_the_file(exported: Exported, family: str) -> None:
    names = load_file(exported(family, "compressed-tensors", "vllm") / "model.safetensors").keys()
    assert not any("lm_head" in name for name in names)


def test_the_head_of_gpt_neox_keeps_its_name_on_disk(exported: Exported) -> None:
    folder = exported("gpt_neox")
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"embed_out", "lm_head"} <= set(ignored)


@pytest.mark.parametrize(("family", "layers"), [("llama", 12), ("opt", 4), ("gpt_neox", 4), ("bloom", 4), ("gemma", 4)])
def test_all_formats_of_a_plan_with_single_units_hold_the_same_numbers(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, layers: int
) -> None:
    """Layers 0 and 1 whole, and a merged and an unmerged unit besides; of Llama layer 1 of 12."""
    loaded = load_model(str(tiny_model(family, layers=layers)))
    qkv, last = loaded.family.units[0], loaded.family.units[-1]
    quantized = quantize_tiny(
        tiny_model(family, layers=layers),
        protected=(0, 1),
        overrides={f"layers.{layers - 2}.{qkv.name}": "fp16", f"layers.3.{last.name}": "fp16"},
    )
    singled_out = {f"{loaded.family.blocks}.{layers - 2}.{name}" for name in qkv.modules}
    singled_out |= {f"{loaded.family.blocks}.3.{name}" for name in last.modules}
    whole = {name for layer in range(2, layers) for name in loaded.family.full_names(layer)}
    assert set(quantized.tensors) == whole - singled_out
    states = {}
    for name in PACKED_FORMATS:
        record = write(quantized, tmp_path / name, format=name)
        assert set(record.quantized_modules) == set(quantized.tensors)
        states[name] = read_dense_state(tmp_path / name)
    expected = states.pop("compressed-tensors")
    for state in states.values():
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_asymmetric_formats_hold_the_same_numbers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_model("qwen2", layers=2), grid=Grid(group_size=32, symmetric=False))
    for name in ("compressed-tensors", "awq"):
        write(quantized, tmp_path / name, format=name, reader=ASYMMETRIC_READER)
    first, second = (read_dense_state(tmp_path / name) for name in ("compressed-tensors", "awq"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    with pytest.raises(UnsupportedModelError, match="asymmetric"):
        write(quantized, tmp_path / "out", format="gptq")


@pytest.mark.parametrize(("family", "layers"), [("llama", 12), ("opt", 4)])
def test_int8_layers_load_in_transformers_and_are_the_same_in_gptq(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, layers: int
) -> None:
    overrides: dict[str, Precision] = {f"layers.{layers - 2}": "int8"}
    quantized = quantize_tiny(tiny_model(family, layers=layers), protected=(0, 1), overrides=overrides)
    record = write(quantized, tmp_path / "ct")
    wide = set(quantized.loaded.family.full_names(layers - 2))
    assert {bits for name, bits in record.quantized_modules.items() if name in wide} == {8}
    assert {bits for name, bits in record.quantized_modules.items() if name not in wide} == {4}
    assert verify(tmp_path / "ct", reader="transformers").complete
    assert "Could not match" not in caplog.text  # what compressed-tensors says of a name that a class came before
    write(quantized, tmp_path / "gptq", format="gptq", reader="vllm")
    first, second = (read_dense_state(tmp_path / name) for name in ("ct", "gptq"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    with pytest.raises(UnsupportedModelError, match="Transformers ignores them"):
        write(quantized, tmp_path / "out", format="gptq")
    with pytest.raises(UnsupportedModelError, match="4-bit integers only"):
        write(quantized, tmp_path / "out", format="awq")


def test_a_single_int8_unit_can_be_merged_by_servers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    overrides: dict[str, Precision] = {"layers.0.gate_up": "int8", "layers.0.down": "fp16"}
    quantized = quantize_tiny(tiny_model("llama", layers=2), overrides=overrides)
    record = write(quantized, tmp_path / "out")
    assert {name for name, bits in record.quantized_modules.items() if bits == 8} == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Other precisions | 0.gate\\_up in 8 bit; 0.down in 16 bit |" in card


@pytest.mark.parametrize(("family", "activation", "length"), [("bloom", "gelu_impl", 128), ("gpt_neox", "act", 64)])
def test_awq_files_hold_scales_of_ones_where_transformers_wants_them(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, activation: str, length: int
) -> None:
    quantized = quantize_tiny(tiny_model(family, layers=3))
    write(quantized, tmp_path / "awq", format="awq")
    write(quantized, tmp_path / "ct")
    awq, ct = (load_file(tmp_path / name / "model.safetensors") for name in ("awq", "ct"))
    blocks = quantized.loaded.family.blocks
    expected = {f"{blocks}.{layer}.mlp.{activation}.scales" for layer in range(3)}  # of the protected layer 1 too
    assert {name for name in awq if name.endswith(f"{activation}.scales")} == expected
    assert all(torch.equal(awq[name], torch.ones(length).half()) for name in expected)
    assert not any(activation in name for name in ct)


@pytest.mark.parametrize("format_name", [*PACKED_FORMATS, "fp16-twin"])
def test_folded_values_replace_the_models(small: QuantizedModel, tmp_path: Path, format_name: Any) -> None:
    """A norm before quantized modules, and a weight of a protected layer."""
    own = small.loaded.model.state_dict()
    names = ("model.layers.0.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight")
    folded = {name: (own[name] * 1.5).half().float() for name in names}
    write(replace(small, folded=folded), tmp_path / "out", format=format_name)
    state = read_dense_state(tmp_path / "out")
    assert all(torch.equal(state[name], folded[name]) for name in names)
    assert torch.equal(state["model.layers.1.input_layernorm.weight"], own["model.layers.1.input_layernorm.weight"])


def test_folded_values_that_did_not_arrive_are_noticed(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = small.loaded.model.state_dict()["model.norm.weight"]
    monkeypatch.setattr(writer, "checkpoint_tensors", lambda _, *rest: checkpoint_tensors(small, *rest))
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: what was written is not what was quantized"):
        write(replace(small, folded={"model.norm.weight": norm + 1}), tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"1 tensors were not written, first model\.nowhere"):
        write(replace(small, folded={"model.nowhere": norm}), tmp_path / "out")


@pytest.mark.parametrize("name", ["missing", "of another length"])
def test_activation_scales_are_expected_tensors(tiny_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    quantized = quantize_tiny(tiny_model("bloom", layers=2))
    record = write(quantized, tmp_path / "out", format="awq")
    shapes = dict(read_header(tmp_path / "out" / "model.safetensors"))
    loaded = quantized.loaded
    modules = modules_by_tensors(loaded.model, loaded.family, shapes, record)
    check_tensor_list(loaded.model, loaded.family, modules, shapes, record, "float16")
    scales = "transformer.h.1.mlp.gelu_impl.scales"
    kind, _ = shapes.pop(scales)
    if name == "of another length":
        shapes[scales] = (kind, (64,))
    with pytest.raises(ArtifactError, match=rf"(missing tensors: {scales})|({scales} is )"):
        check_tensor_list(loaded.model, loaded.family, modules, shapes, record, "float16")


@pytest.mark.parametrize(("format_name", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_other_zero_points_than_a_symmetric_grid_has_are_found(
    tiny_model: Callable[..., Path], tmp_path: Path, format_name: Any, bits: int
) -> None:
    overrides: dict[str, Precision] = {"layers.0": "int8"} if bits == 8 else {}
    quantized = quantize_tiny(tiny_model("llama", layers=2), overrides=overrides)
    record = write(quantized, tmp_path / "out", format=format_name, reader="vllm")
    path = tmp_path / "out" / "model.safetensors"
    check_values(tmp_path / "out", record)
    stored = load_file(path)
    stored["model.layers.0.mlp.up_proj.qzeros"][0, 1] ^= 1 << bits  # the last bit of the second zero point of a word
    save_file(stored, path)
    with pytest.raises(ArtifactError, match=r"up_proj\.qzeros: not the zero points of a symmetric grid"):
        check_values(tmp_path / "out", record)


def test_the_source_files_are_copied_and_nothing_else(small: QuantizedModel, tmp_path: Path) -> None:
    source = Path(shutil.copytree(small.loaded.files.folder, tmp_path / "source"))
    copied = {
        "LICENSE": b"licence\r\n", "chat_template.jinja": "{{ 'שלום' }}".encode(), "vocab.txt": b"\x00\xff",
        "additional_chat_templates/tool.jinja": b"{{ 1 }}", "tokenizer.model": b"sentencepiece",
        "NOTICE.txt": b"notice", "Gemma_Terms_of_Use_LICENSE.md": b"terms", "preprocessor_config.json": b"{}",
    }  # fmt: skip
    left = (
        "hf_quant_config.json", "quant_config.json", "quantization_config.json", "model.safetensors.bak",
        "training_args.bin", "optimizer.pt", "trainer_state.json", "x.imatrix", "picture.png", "config.json.orig",
        "modeling_x.py", "recipe.yaml", "runs/events.out", "license_checker.py",
        "pytorch_model.bin", "model.pt", "tf_model.h5", "consolidated.safetensors", "x.gguf", "a.pkl",
        "flax.index.json", ".hidden", "onnx/model.onnx", "onnx/config.json", "quantize_config.json",
    )  # fmt: skip
    (source / "README.md").write_bytes(b"---\nlicense: gemma\n---\nNot for medical use.\r\n")
    for name, content in [*copied.items(), *((name, b"no") for name in left)]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    loaded = replace(small.loaded, files=replace(small.loaded.files, folder=source))
    record = write(replace(small, loaded=loaded), tmp_path / "out")
    own = {"README.md", "config.json", "model.safetensors"}
    tokenizer = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(record.files) == own | tokenizer | set(copied) | {"README.source.md"}
    for name in (*tokenizer, *copied):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert '\nlicense: "gemma"\n' in card
    assert (tmp_path / "out" / "README.source.md").read_bytes() == (source / "README.md").read_bytes()


def test_the_config_is_the_sources_with_three_changes(small: QuantizedModel, exported: Exported) -> None:
    source = json.loads((small.loaded.files.folder / "config.json").read_text())
    source.pop("num_hidden_layers")
    written = json.loads((exported() / "config.json").read_text())
    assert written.pop("num_hidden_layers") == 12
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == source | {"dtype": "float16"}


@pytest.mark.parametrize("format_name", ["gptq", "awq"])
def test_the_same_metadata_is_written_beside(exported: Exported, format_name: str) -> None:
    folder = exported("llama", format_name)
    config = json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "quantize_config.json").read_text()) == config["quantization_config"]


def test_a_bfloat16_source_stays_bfloat16_and_the_old_key_is_kept(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model("llama", dtype="bfloat16"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    write(quantize_tiny(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.bfloat16}


def test_two_exports_of_the_same_model_are_equal_byte_for_byte(small: QuantizedModel, tmp_path: Path) -> None:
    first, second = write(small, tmp_path / "a"), write(small, tmp_path / "b")
    assert first == second
    assert (tmp_path / "a" / "quant_fairness.json").read_bytes() == (
        tmp_path / "b" / "quant_fairness.json"
    ).read_bytes()


def test_the_record_on_disk_is_the_returned_one(small: QuantizedModel, tmp_path: Path) -> None:
    record = write(small, tmp_path / "out")
    assert load(ExportRecord, tmp_path / "out" / "quant_fairness.json") == record
    assert record.plan.protected_layers == (1,)
    assert record.quantized_modules == dict.fromkeys(small.tensors, 4)
    assert set(record.files) == {p.name for p in (tmp_path / "out").iterdir()} - {"quant_fairness.json"}


def test_file_modes_follow_the_umask(small: QuantizedModel, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(small, tmp_path / "out")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}


def test_the_model_and_its_layers_are_left_unchanged(small: QuantizedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in small.loaded.model.state_dict().items()}
    write(small, tmp_path / "out")
    after = small.loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_that_is_only_in_memory_can_be_exported(tmp_path: Path, small: QuantizedModel) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", layers=2, width=32)).half().float()
    loaded = from_loaded(model, small.loaded.tokenizer)
    record = write(quantize_layers(loaded, (1,), method="rtn", grid=GRID), tmp_path / "out")
    assert {"tokenizer.json", "generation_config.json", "config.json"} <= set(record.files)
    assert verify(tmp_path / "out").complete


def test_the_measurement_is_of_the_written_folder_and_lands_in_record_and_card(
    small: QuantizedModel, tmp_path: Path
) -> None:
    seen: list[Path] = []

    def measure(folder: Path) -> Measurement:
        seen.append(folder)
        assert read_dense_state(folder)
        return measurement()

    record = write(small, tmp_path / "out", measure=measure)
    assert seen[0].name.startswith("out.partial-")
    assert record.measurement == measurement()
    assert "| he |" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out").checks[0].outcome == "passed"


def test_a_failure_at_any_disk_operation_leaves_nothing(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untried = VerifyReport(
        folder="out", format="gptq", checks=(CheckResult(name="reader", outcome="not run", detail="not asked"),)
    )
    monkeypatch.setattr(writer, "verify", lambda folder, **options: untried)  # nothing is written there
    state = {"n": 0, "fail_at": 0}

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            state["n"] += 1
            if state["n"] == state["fail_at"]:
                raise OSError(28, "No space left on device")
            real(*args)

        return call

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for n in range(1, 60):
        state |= {"n": 0, "fail_at": n}
        try:
            write(small, tmp_path / "out")
        except ResourceError:
            assert list(tmp_path.iterdir()) == []
        else:
            assert n > 10
            assert [p.name for p in tmp_path.iterdir()] == ["out"]
            return
    raise AssertionError("no export passed")


@pytest.mark.parametrize("error", [ArtifactError("wrong"), KeyboardInterrupt()])
def test_a_failed_verification_leaves_the_old_export(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write(small, tmp_path / "out")
    before = (tmp_path / "out" / "quant_fairness.json").read_bytes()

    def fail(folder: Path, **options: object) -> None:
        raise error

    monkeypatch.setattr(writer, "verify", fail)
    with pytest.raises(type(error)):  # the error planted above
        write(small, tmp_path / "out", format="gptq", overwrite=True)
    assert (tmp_path / "out" / "quant_fairness.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_written_is_compared_with_what_was_quantized(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = checkpoint_format("compressed-tensors")

    def one_nibble_off(quantized: QuantizedModel, _: object) -> Any:
        for name, tensor in checkpoint_tensors(quantized, layout):
            yield (
                name,
                tensor ^ (tensor == tensor.flatten()[5]).int() if name.endswith("up_proj.weight_packed") else tensor,
            )

    monkeypatch.setattr(writer, "checkpoint_tensors", one_nibble_off)
    with pytest.raises(ArtifactError, match="what was written is not what was quantized"):
        write(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_is_written(small: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        write(small, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_overwrite_replaces_an_earlier_export(small: QuantizedModel, tmp_path: Path) -> None:
    write(small, tmp_path / "out")
    write(small, tmp_path / "out", format="gptq", overwrite=True)
    assert verify(tmp_path / "out").format == "gptq"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_source_model_is_never_overwritten(small: QuantizedModel) -> None:
    source = small.loaded.files.folder
    for out in (source, source.parent):
        with pytest.raises(ConfigError, match="exists already|not a checkpoint|holds the source model"):
            write(small, out, overwrite=True)
    assert (source / "model.safetensors").exists()


def test_an_earlier_export_that_is_the_source_is_not_overwritten(small: QuantizedModel, tmp_path: Path) -> None:
    write(small, tmp_path / "twin", format="fp16-twin")
    again = quantize_tiny(tmp_path / "twin")
    with pytest.raises(ConfigError, match="holds the source model"):
        write(again, tmp_path / "twin", overwrite=True)


def test_the_plan_of_the_record_is_the_one_that_was_quantized(small: QuantizedModel, tmp_path: Path) -> None:
    plan = plan_of_layers(
        small.loaded, (1,), grid=Grid(group_size=32, symmetric=False), overrides={"layers.0.down": "int8"}
    )
    record = write(quantize_model(small.loaded, plan, method="rtn"), tmp_path / "out", reader=ASYMMETRIC_READER)
    assert record.plan == plan
    assert {bits for name, bits in record.quantized_modules.items() if name.endswith("down_proj")} == {8}


def test_a_full_disk_is_told_before_anything_is_written(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    monkeypatch.setattr(writer, "write_shards", None)
    with pytest.raises(ResourceError, match=r"1000 bytes are free, about \d+ are needed"):
        write(small, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_gpt2_for_transformers_is_refused_with_two_ways_out(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized = quantize_tiny(tiny_model("gpt2", layers=2))
    with pytest.raises(UnsupportedModelError, match=r"--reader vllm, or --format fp16-twin"):
        write(quantized, tmp_path / "out")


def test_an_untied_copy_of_a_shared_tensor_is_stored_twice(small: QuantizedModel) -> None:
    model = small.loaded.model
    head = model.lm_head.weight
    try:
        model.lm_head.weight = model.model.embed_tokens.weight
        names = [name for name, _ in checkpoint_tensors(small, checkpoint_format("fp16-twin"))]
        assert "lm_head.weight" in names
        model.config.tie_word_embeddings = True
        names = [name for name, _ in checkpoint_tensors(small, checkpoint_format("fp16-twin"))]
        assert "lm_head.weight" not in names
    finally:
        model.lm_head.weight = head
        model.config.tie_word_embeddings = False


@pytest.mark.parametrize(("limit", "shards"), [(10**9, 1), (5000, None), (1, 5)])
def test_shards_hold_every_tensor_once_in_order_within_the_limit(
    tmp_path: Path, limit: int, shards: int | None
) -> None:
    tensors = {f"t{i}": torch.full((i * 500 + 1,), float(i)).half() for i in range(5)}
    write_shards(tensors.items(), tmp_path, shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (shards or 3)
    stored = [load_file(path) for path in files]
    names = [name for shard in stored for name in shard]
    assert sorted(names) == sorted(tensors)
    assert all(torch.equal(shard[name], tensors[name]) for shard in stored for name in shard)
    assert all(sum(t.nbytes for t in shard.values()) <= limit or len(shard) == 1 for shard in stored)
    if len(files) == 1:
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / INDEX).read_text())
    where = {name: path.name for path, shard in zip(files, stored, strict=True) for name in shard}
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert files[0].name == f"model-00001-of-0000{len(files)}.safetensors"


@pytest.mark.parametrize("format_name", PACKED_FORMATS)
def test_a_sharded_export_loads_everywhere(
    small: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: Any
) -> None:
    monkeypatch.setattr(writer, "write_shards", partial(write_shards, shard_bytes=20_000))
    record = write(small, tmp_path / "out", format=format_name)
    assert INDEX in record.files
    assert len([name for name in record.files if name.endswith(".safetensors")]) > 2
    report = verify(tmp_path / "out")
    assert {check.name for check in report.checks if check.outcome == "passed"} >= {"headers", "tensors", "values"}


def test_a_width_that_no_group_divides_stays_16_bit_and_is_listed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = quantize_tiny(tiny_model("llama", layers=2, width=48), grid=Grid(group_size=64))
    record = write(quantized, tmp_path / "out")
    assert record.quantized_modules == {"model.layers.0.mlp.down_proj": 4}  # 96 input channels, in groups of 32
    assert record.grids == "int4 g32 sym absmax"
    assert "model.layers.0.self_attn.q_proj" in record.kept_modules
    card = (tmp_path / "out" / "README.md").read_text()
    assert "48 input channels are not a multiple of group size 32" in card
    for name in ("gptq", "awq"):
        assert write(quantized, tmp_path / name, format=name).kept_modules == record.kept_modules


def test_a_head_that_the_config_ties_and_the_file_does_not_is_exported_as_its_own(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """So every reader computes what Transformers computes from the source."""
    source = Path(shutil.copytree(tiny_model("llama", layers=2), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    write(quantize_tiny(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    head, own = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (source, tmp_path / "out"))
    assert torch.equal(head, own)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_bfloat16_model_saved_in_32_bit_is_served_in_bfloat16(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    """Its residual stream exceeds float16, as its config knows."""
    source = Path(shutil.copytree(tiny_model("llama", dtype="float32"), tmp_path / "source"))
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][7] = 60_000.0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))
    write(quantize_tiny(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {written.get(name) for name in ("dtype", key)} == {"bfloat16"}
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values() if t.is_floating_point()} == {
        torch.bfloat16
    }


def test_what_overflows_in_its_own_dtype_gets_no_name(small: QuantizedModel, tmp_path: Path) -> None:
    """A quantized model that is stored in float16 against all checks."""
    name = "model.layers.1.mlp.down_proj.weight"
    folded = {name: torch.full_like(small.loaded.model.get_parameter(name), 60_000.0)}
    with pytest.raises(ArtifactError, match=r"in float16, which its config\.json says it is served in"):
        write(replace(small, folded=folded), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
