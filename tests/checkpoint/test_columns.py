"""16-bit input channels in a side file: written, listed, checked, and no business of any other reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_fairness_plugin.artifacts import CheckpointFormat, ExportRecord, load, save
from quant_fairness_plugin.checkpoint import columns as checking
from quant_fairness_plugin.checkpoint.columns import COLUMNS_FILE, read_columns
from quant_fairness_plugin.checkpoint.dequantize import load_dense_model, read_dense_state
from quant_fairness_plugin.checkpoint.folder import RECORD, file_record, list_files
from quant_fairness_plugin.errors import ArtifactError
from quant_fairness_plugin.export.card import render_card
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.resolve import model_sha256, resolve_model
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from tests.export.build import TEXTS, quantize_tiny, quantize_with_columns

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[..., Path]) -> QuantizedModel:
    return quantize_with_columns(tiny_model("llama"))


@pytest.fixture(scope="module")
def written(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("columns") / "out"
    export(quantized, out, texts=TEXTS)
    return out


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def record_again(folder: Path) -> None:
    """Make the checksums fit, so that the later checks have to find the damage."""
    record = load(ExportRecord, folder / RECORD)
    save(replace(record, files={name: file_record(folder / name) for name in list_files(folder)}), folder / RECORD)


def test_the_file_holds_channels_and_differences_and_the_record_counts_them(
    written: Path, quantized: QuantizedModel
) -> None:
    tensors, record = load_file(written / COLUMNS_FILE), load(ExportRecord, written / RECORD)
    assert set(tensors) == {f"{name}.{suffix}" for name in quantized.tensors for suffix in ("idx", "delta")}
    assert tensors[f"{Q_PROJ}.idx"].dtype == torch.int32
    assert tensors[f"{Q_PROJ}.delta"].dtype == torch.float16
    assert record.protected_columns == {name: len(kept.index) for name, kept in quantized.columns.items()}
    assert record.protected_columns[Q_PROJ] == 3
    assert record.files[COLUMNS_FILE] == file_record(written / COLUMNS_FILE)
    assert (written / COLUMNS_FILE).stat().st_mode & 0o777 == (written / "model.safetensors").stat().st_mode & 0o777


def test_verify_says_what_it_saw_and_transformers_computes_the_integers_alone(written: Path) -> None:
    report = verify(written)
    details = {check.name: check.detail for check in report.checks}
    # qkv, o and gate_up are 32 wide, down is 64 wide: 7 modules of one layer
    assert details["columns"].startswith("24 input channels of 7 modules in 16 bit, not compared with the source")
    assert details["reader"].startswith("transformers ")


def test_an_index_keeps_readers_of_all_files_from_the_side_file(written: Path, quantized: QuantizedModel) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert set(index["weight_map"]) == set(load_file(written / "model.safetensors"))
    dense = load_dense_model(written).get_submodule(Q_PROJ).weight
    assert torch.equal(dense, quantized.tensors[Q_PROJ].dequantize())


@pytest.mark.parametrize(("family", "format_name"), [("gpt2", "gptq"), ("llama", "awq")])
def test_other_formats_and_orientations(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, format_name: CheckpointFormat
) -> None:
    quantized = quantize_with_columns(tiny_model(family), method="awq" if format_name == "awq" else "gptq")
    export(quantized, tmp_path / "out", texts=TEXTS, format=format_name, reader="vllm")
    found = read_columns(tmp_path / "out")
    assert found.keys() == quantized.columns.keys()
    for name, kept in found.items():
        assert torch.equal(kept.index, quantized.columns[name].index)
        assert torch.equal(kept.delta, quantized.columns[name].delta)


def test_a_twin_holds_the_channels_itself(quantized: QuantizedModel, tmp_path: Path) -> None:
    record = export(quantized, tmp_path / "out", texts=TEXTS, format="fp16-twin", reader="vllm")
    assert record.protected_columns == {}
    assert not (tmp_path / "out" / COLUMNS_FILE).exists()
    stored = read_dense_state(tmp_path / "out")[f"{Q_PROJ}.weight"]
    assert torch.equal(stored, quantized.dense_weight(Q_PROJ).half().float())


def test_one_flipped_byte_is_seen(copy: Path) -> None:
    data = bytearray((copy / COLUMNS_FILE).read_bytes())
    data[-1] ^= 1
    (copy / COLUMNS_FILE).write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=f"{COLUMNS_FILE} was altered") as caught:
        verify(copy)
    assert caught.value.exit_code == 5


def first_is(key: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[key].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[f"{Q_PROJ}.idx"].__setitem__(-1, 32),
            r"has channels up to 32 and 32 rows; the module is \[32, 32",
        ),
        (lambda t: t[f"{Q_PROJ}.idx"].__setitem__(1, int(t[f"{Q_PROJ}.idx"][0])), "must be ascending, each once"),
        (first_is(f"{Q_PROJ}.idx", -1), "must be ascending, each once, from 0"),
        (first_is(f"{Q_PROJ}.delta", float("nan")), "q_proj.delta holds NaN"),
        (lambda t: t.pop(f"{Q_PROJ}.delta"), "q_proj.delta is missing"),
        (lambda t: t.update({f"{Q_PROJ}.what": torch.zeros(1)}), "q_proj.what is unexpected"),
        (lambda t: [t.pop(f"{Q_PROJ}.{s}") for s in ("idx", "delta")], "q_proj keeps 0 input channels, recorded are 3"),
        (lambda t: t.update({f"{Q_PROJ}.idx": t[f"{Q_PROJ}.idx"].long()}), "has torch.int64 channels"),
        (lambda t: t.update({f"{Q_PROJ}.delta": t[f"{Q_PROJ}.delta"][:, 1:].clone()}), r"difference \[32, 2\]"),
        (lambda t: t.update({f"{Q_PROJ}.delta": t[f"{Q_PROJ}.delta"][1:].clone()}), "and 31 rows"),
        (lambda t: t.update({f"{Q_PROJ}.delta": t[f"{Q_PROJ}.delta"].bfloat16()}), "expected float16"),
    ],
)
def test_a_damaged_file_with_matching_checksums_is_refused(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    tensors = load_file(copy / COLUMNS_FILE)
    change(tensors)
    save_file(tensors, copy / COLUMNS_FILE, metadata={"format": "pt"})
    record_again(copy)
    with pytest.raises(ArtifactError, match=message):
        verify(copy)


def test_channels_that_the_record_does_not_know_are_refused(copy: Path) -> None:
    record = load(ExportRecord, copy / RECORD)
    save(replace(record, protected_columns={}), copy / RECORD)
    with pytest.raises(ArtifactError, match="keeps 6 input channels, recorded are 0"):
        verify(copy)


def test_a_removed_file_is_missing(copy: Path) -> None:
    (copy / COLUMNS_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"missing: {COLUMNS_FILE}"):
        verify(copy)
    record_again(copy)
    with pytest.raises(ArtifactError, match="keeps 0 input channels, recorded are"):
        verify(copy)


def test_the_difference_is_compared_with_the_source_where_it_is_at_hand(
    copy: Path, quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = {name: tensor.half() for name, tensor in quantized.loaded.model.state_dict().items()}
    monkeypatch.setattr(checking, "_source_weights", lambda record: source)
    details = {check.name: check.detail for check in verify(copy).checks}
    assert "16 bit, the difference to " in details["columns"]
    tensors = load_file(copy / COLUMNS_FILE)
    tensors[f"{Q_PROJ}.delta"][0, 0] *= 2
    save_file(tensors, copy / COLUMNS_FILE, metadata={"format": "pt"})
    record_again(copy)
    with pytest.raises(ArtifactError, match="q_proj.delta is not the difference to the 16-bit weight"):
        verify(copy)


@pytest.mark.parametrize("name", ["demo", "demo-gpt2"])
def test_the_source_of_a_bundled_model_is_at_hand(written: Path, name: str) -> None:
    record = load(ExportRecord, written / RECORD)
    assert checking._source_weights(record) is None
    checksum = model_sha256(resolve_model(name))
    made = replace(record.provenance, model=name, model_sha256=checksum)
    weights = checking._source_weights(replace(record, provenance=made))
    assert weights is not None
    block = "model.layers.0.self_attn.q_proj" if name == "demo" else "transformer.h.0.attn.c_attn"
    assert f"{block}.weight" in weights
    assert checking._source_weights(replace(record, provenance=replace(made, model_sha256="0" * 64))) is None


def test_the_card_says_who_reads_them(written: Path, tiny_model: Callable[..., Path]) -> None:
    card = (written / "README.md").read_text()
    assert "24 input channels of 7 of these modules" in " ".join(card.split())
    assert "Only the loader of quant-fairness reads that file" in card
    assert "| Input channels in 16 bit | 10 % of each quantized module |" in card
    record = load(ExportRecord, written / RECORD)
    plain = replace(record, protected_columns={}, plan=quantize_tiny(tiny_model("llama")).plan)
    assert "nput channels" not in render_card(plain)
