from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model, read_dense_state
from quant_fairness_plugin.errors import ArtifactError, ConfigError, UnsupportedModelError
from quant_fairness_plugin.export.gguf import write_gguf
from quant_fairness_plugin.export.gguf.blocks import packed_blocks
from quant_fairness_plugin.export.gguf.template import Template
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.weights import read_json
from quant_fairness_plugin.quantize.grid import QuantizedTensor, quantize_rtn
from tests.export.build import TEXTS, quantize_tiny, quantize_with_columns
from tests.export.gguf_files import as_converted, gguf_name, read_values, write_gguf_of

Exported = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")
LAYERS = 12


def expected(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint's file has to stand for: each value where the converter puts it."""
    config = read_json(folder / "config.json")
    return {gguf_name(n): as_converted(n, t, config) for n, t in read_dense_state(folder).items()}


@pytest.fixture
def template(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def build(family: str = "llama", **options: Any) -> Path:
        return write_gguf_of(tiny_model(family, layers=LAYERS), tmp_path / f"{family}.gguf", **options)

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_stands_where_llama_cpp_looks_for_it(
    exported: Exported, template: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = exported(family, reader="vllm" if family == "gpt2" else "transformers")
    report = write_gguf(folder, template(family), tmp_path / "out.gguf", embedding="16bit")
    wanted, written = expected(folder), read_values(tmp_path / "out.gguf")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert report.exact
    assert report.embedding_error is None
    assert report.types["Q4_0"] == report.packed > 0
    assert report.rearranged == (2 * LAYERS if family in ("llama", "mistral") else 0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_computes_with_the_file_what_the_checkpoint_says(
    exported: Exported, template: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Its GGUF reader puts the rows back by rules of its own."""
    folder = exported(family)
    write_gguf(folder, template(family), tmp_path / "out.gguf", embedding="16bit")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32)
    ids = torch.arange(1, 24)[None]
    with torch.no_grad():
        found, wanted = model(ids).logits, load_dense_model(folder)(ids).logits
    # The same values in the same order of operations: what differs is rounding of the rotary embedding's base.
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("format_name", ["gptq", "fp16-twin"])
def test_checkpoints_of_other_layouts_go_in(
    exported: Exported, template: Callable[..., Path], tmp_path: Path, format_name: str
) -> None:
    folder = exported("llama", format_name)
    report = write_gguf(folder, template(), tmp_path / "out.gguf", embedding="16bit")
    wanted, written = expected(folder), read_values(tmp_path / "out.gguf")
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert report.types.get("Q4_0", 0) == report.packed == (77 if format_name == "gptq" else 0)


def test_permuted_channels_are_refused(damaged: Exported, template: Callable[..., Path], tmp_path: Path) -> None:
    """Act-order of other tools: the group of each channel, which a block cannot say."""
    folder = damaged("llama", "gptq")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ArtifactError, UnsupportedModelError), match=r"layers\.0\.mlp\.down_proj|ffn_down"):
        write_gguf(folder, template(), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_template_of_four_bits_serves_as_well(
    exported: Exported, template: Callable[..., Path], tmp_path: Path
) -> None:
    folder = exported()
    write_gguf(folder, template(kind="Q4_1"), tmp_path / "out.gguf")
    wanted, written = expected(folder), read_values(tmp_path / "out.gguf")
    assert all(torch.equal(written[n], wanted[n]) for n in wanted if n not in ("token_embd.weight", "output.weight"))


def test_embedding_and_head_are_rounded_to_eight_bits(
    exported: Exported, template: Callable[..., Path], tmp_path: Path
) -> None:
    folder = exported()
    report = write_gguf(folder, template(), tmp_path / "out.gguf")
    wanted, written = expected(folder), read_values(tmp_path / "out.gguf")
    assert report.types["Q8_0"] == 2
    shares = []
    for name in ("token_embd.weight", "output.weight"):
        off = (written[name] - wanted[name]).norm() / wanted[name].norm()
        shares.append(float(off))
        steps = wanted[name].view(-1, 32).abs().amax(1, keepdim=True) / 127
        assert bool(((written[name] - wanted[name]).view(-1, 32).abs() <= 0.6 * steps).all())
    assert report.embedding_error == pytest.approx(max(shares), rel=1e-5)
    assert 0 < max(shares) < 0.01


def test_metadata_is_the_templates_but_for_the_type(
    exported: Exported, template: Callable[..., Path], tmp_path: Path
) -> None:
    like = template()
    write_gguf(exported(), like, tmp_path / "out.gguf")
    before, after = (gguf.GGUFReader(path).fields for path in (like, tmp_path / "out.gguf"))
    assert before.keys() == after.keys()
    differing = {key for key in before if before[key].contents() != after[key].contents()}
    assert differing == {"general.file_type"}
    assert after["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0


def test_int8_units_and_16_bit_layers_keep_their_values(
    tiny_model: Callable[..., Path], template: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = quantize_tiny(tiny_model(layers=LAYERS), overrides={"layers.3.down": "int8", "layers.5.qkv": "int8"})
    export(quantized, tmp_path / "checkpoint", texts=TEXTS)
    report = write_gguf(tmp_path / "checkpoint", template(), tmp_path / "out.gguf", embedding="16bit")
    wanted, written = expected(tmp_path / "checkpoint"), read_values(tmp_path / "out.gguf")
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert {name for name, kind in kinds.items() if kind == "Q8_0"} == {
        "blk.3.ffn_down.weight", "blk.5.attn_q.weight", "blk.5.attn_k.weight", "blk.5.attn_v.weight",
    }  # fmt: skip
    assert kinds["blk.1.attn_q.weight"] == "F16"
    assert report.packed == report.types["Q4_0"] + report.types["Q8_0"]


@pytest.mark.parametrize("bits", [4, 5, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_blocks_repeat_the_scale_of_a_larger_group(bits: int, group_size: int) -> None:
    weight = torch.randn(5, 384)
    tensor = quantize_rtn(weight, Grid(bits=bits, group_size=group_size), scale_dtype=torch.float16)
    blocks = packed_blocks("m", tensor)
    kind = gguf.GGMLQuantizationType[f"Q{bits}_0"]
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(blocks, kind)), tensor.dequantize())


def test_a_model_in_memory_may_have_five_bits(
    tiny_model: Callable[..., Path], template: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(layers=LAYERS)
    quantized = quantize_tiny(model, grid=Grid(bits=5, group_size=32), overrides={"layers.3.down": "int8"})
    report = write_gguf(quantized, template(), tmp_path / "out.gguf", embedding="16bit")
    config, written = read_json(model / "config.json"), read_values(tmp_path / "out.gguf")
    state = read_dense_state(model) | {f"{name}.weight": quantized.dense_weight(name) for name in quantized.tensors}
    wanted = {gguf_name(name): as_converted(name, tensor, config) for name, tensor in state.items()}
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert (report.types["Q5_0"], report.types["Q8_0"]) == (76, 1)
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["general.file_type"].contents() == 8  # MOSTLY_Q5_0


def test_a_model_in_memory_of_other_widths_is_refused(
    tiny_model: Callable[..., Path], template: Callable[..., Path], tmp_path: Path
) -> None:
    quantized = quantize_tiny(tiny_model(layers=LAYERS), grid=Grid(bits=3, group_size=32))
    with pytest.raises(UnsupportedModelError, match="has 3 bits; GGUF files are written with 4, 5, 8"):
        write_gguf(quantized, template(), tmp_path / "out.gguf")
    columns = quantize_with_columns(tiny_model(layers=LAYERS))
    with pytest.raises(UnsupportedModelError, match="keeps input channels in 16 bit"):
        write_gguf(columns, template(), tmp_path / "out.gguf")


def test_what_a_block_cannot_hold_is_refused() -> None:
    weight = torch.randn(4, 96)
    with pytest.raises(UnsupportedModelError, match="m has zero points other than 8.*--sym"):
        packed_blocks("m", quantize_rtn(weight.abs(), Grid(group_size=32, symmetric=False), scale_dtype=torch.float16))
    short = quantize_rtn(weight[:, :48], Grid(group_size=-1), scale_dtype=torch.float16)
    with pytest.raises(UnsupportedModelError, match="groups of 48 input channels; GGUF's blocks are of 32"):
        packed_blocks("m", short)
    large = quantize_rtn(weight * 1e6, Grid(group_size=32), scale_dtype=torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="scales above 65504"):
        packed_blocks("m", large)


def test_small_scales_that_float16_rounds_are_said() -> None:
    scales = torch.tensor([[2.0**-20 * 1.0078125]], dtype=torch.bfloat16)
    zeros = torch.full((1, 1), 8, dtype=torch.uint8)
    integers = torch.arange(32, dtype=torch.uint8)[None] % 16
    tensor = QuantizedTensor(integers=integers, scales=scales, zeros=zeros, grid=Grid(group_size=32))
    values = gguf.quants.dequantize(packed_blocks("m", tensor), gguf.GGMLQuantizationType.Q4_0)
    off = (torch.from_numpy(values) - tensor.dequantize()).abs().max()
    assert 0 < off <= 8 * 2.0**-25


@pytest.mark.parametrize("change", ["another model", "another tensor", "a tensor less", "another shape"])
def test_a_file_of_another_model_is_refused(
    exported: Exported, tiny_model: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    model, path = tiny_model(layers=LAYERS), tmp_path / "like.gguf"
    match change:
        case "another model":  # of the same shapes
            config = AutoModelForCausalLM.from_pretrained(model).config
            AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "other")
            write_gguf_of(tmp_path / "other", path)
            message = r"\.weight is \S+ of its size away.*another model"
        case "another tensor":
            write_gguf_of(model, path, add="blk.0.attn_q.scale")
            message = "blk.0.attn_q.scale has no counterpart"
        case "a tensor less":
            write_gguf_of(model, path, leave_out="model.layers.3.mlp.up_proj.weight")
            message = r"has no place for model\.layers\.3\.mlp\.up_proj"
        case _:
            write_gguf_of(tiny_model(layers=LAYERS, width=64), path)
            message = "has the shape .* in the checkpoint"
    with pytest.raises((ArtifactError, UnsupportedModelError), match=message):
        write_gguf(exported(), path, tmp_path / "out.gguf")
    assert sorted(each.name for each in tmp_path.iterdir() if "out" in each.name) == []


def test_a_tensor_only_in_gguf_files_is_copied(
    exported: Exported, template: Callable[..., Path], tmp_path: Path
) -> None:
    write_gguf(exported(), template(add="rope_freqs.weight"), tmp_path / "out.gguf")
    assert torch.equal(read_values(tmp_path / "out.gguf")["rope_freqs.weight"], torch.ones(4))


def test_a_template_in_float32_says_nothing_of_types(
    exported: Exported, template: Callable[..., Path], tmp_path: Path
) -> None:
    report = write_gguf(exported(), template(kind="F32"), tmp_path / "out.gguf")
    assert report.types["Q8_0"] == 2
    assert report.types["F16"] == 7  # of the layer in 16 bit


def test_the_alignment_is_the_templates(exported: Exported, template: Callable[..., Path], tmp_path: Path) -> None:
    folder = exported()
    write_gguf(folder, template(alignment=128), tmp_path / "out.gguf", embedding="16bit")
    wanted, written = expected(folder), read_values(tmp_path / "out.gguf")
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    assert all(tensor.data_offset % 128 == 0 for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors)


def test_one_part_of_several_is_refused(template: Callable[..., Path], tmp_path: Path) -> None:
    parts = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    parts.add_block_count(2)
    parts.add_uint16("split.count", 2)
    parts.write_header_to_file()
    parts.write_kv_data_to_file()
    parts.write_tensors_to_file()
    parts.close()
    with pytest.raises(ArtifactError, match="one part of several.*llama-gguf-split --merge"):
        Template(tmp_path / "part.gguf")


def test_no_file_is_replaced_unasked(exported: Exported, template: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_gguf(exported(), template(), out)
    assert out.read_bytes() == b"mine"
    write_gguf(exported(), template(), out, overwrite=True)
    assert len(out.read_bytes()) > 1000
    with pytest.raises(ConfigError, match=r"does not end in \.gguf"):
        write_gguf(exported(), template(), tmp_path / "out.bin")


def test_a_file_that_is_no_gguf_is_one_line(exported: Exported, template: Callable[..., Path], tmp_path: Path) -> None:
    like = tmp_path / "like.gguf"
    for content in (b"", b"GGUF", b"PK" * 40, template().read_bytes()[:200]):
        like.write_bytes(content)
        with pytest.raises(ArtifactError, match="is no GGUF file that can be read"):
            Template(like)
    with pytest.raises(ArtifactError, match="is not a file"):
        Template(tmp_path / "none.gguf")


def test_a_value_that_was_written_wrong_leaves_no_file(
    exported: Exported, template: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant_fairness_plugin.export import gguf as writing

    def off_by_one(name: str, tensor: QuantizedTensor) -> Any:
        blocks = packed_blocks(name, tensor)
        blocks[0, 2] ^= 1
        return blocks

    monkeypatch.setattr(writing, "packed_blocks", off_by_one)
    with pytest.raises(ArtifactError, match="does not hold the checkpoint's values; nothing was written"):
        write_gguf(exported(), template(), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_channels_in_16_bit_and_experts_are_refused(
    tiny_model: Callable[..., Path], template: Callable[..., Path], tmp_path: Path
) -> None:
    export(quantize_with_columns(tiny_model(layers=LAYERS)), tmp_path / "columns", texts=TEXTS)
    with pytest.raises(UnsupportedModelError, match="keeps input channels in 16 bit"):
        write_gguf(tmp_path / "columns", template(), tmp_path / "out.gguf")
    with pytest.raises(UnsupportedModelError, match=r"is a MixtralForCausalLM; mixtures of experts.*recommend --as"):
        write_gguf(tiny_model("mixtral"), template(), tmp_path / "out.gguf")
