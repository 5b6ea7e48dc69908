"""`verify` names what is wrong with a folder, and says which checks it could not run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from quant_fairness_plugin.artifacts import ExportRecord, Grid, load, save
from quant_fairness_plugin.checkpoint.dequantize import bare_model, load_dense_model
from quant_fairness_plugin.checkpoint.folder import RECORD, file_record, list_files, load_record
from quant_fairness_plugin.checkpoint.readers import find_refusal
from quant_fairness_plugin.checkpoint.readers.compare import (
    compare_with_transformers,
    fixed_prompts,
    logits_block_by_block,
    missing_packages,
)
from quant_fairness_plugin.checkpoint.readers.running import read_with
from quant_fairness_plugin.errors import ArtifactError, ConfigError, MissingExtraError, UnsupportedModelError
from quant_fairness_plugin.export.verify import verify
from quant_fairness_plugin.model.activations import spread_ids
from tests.export import foreign_folders as tools
from tests.export.conftest import Exported, rewrite_json

Tensors = dict[str, torch.Tensor]
FakeReader = Callable[..., Path]
NEW_TOKENS = 4


def executable(path: Path, script: str) -> Path:
    """What is run in place of a Python: $1 script, $2 checkpoint, $3 request, $4 where the answer goes."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_reader(tmp_path: Path) -> FakeReader:
    """A reader that computes in float16 what our dequantizer says, with a change made to its model."""

    def build(
        folder: Path, change: Callable[[PreTrainedModel], object] = lambda model: None, *, likeliest: bool = True
    ) -> Path:
        model = load_dense_model(folder)
        prompts = fixed_prompts(model)
        change(model)
        sequences = [continued(model.half(), prompt, likeliest=likeliest) for prompt in prompts]  # type: ignore[no-untyped-call]
        answer = {"version": "1.2.3", "methods": {}, "sequences": sequences}
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        return executable(tmp_path / "python", f"cp '{tmp_path}/answer.json' \"$4\"")

    return build


@torch.no_grad()
def continued(model: PreTrainedModel, ids: list[int], *, likeliest: bool) -> dict[str, object]:
    for _ in range(NEW_TOKENS):
        row = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(row.argmax() if likeliest else row.argmin())]
    rows = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    predictions = [{str(t): float(row[t]) for t in row.topk(5).indices.tolist()} for row in rows]
    return {"ids": ids, "new": NEW_TOKENS, "predictions": predictions}


def record_again(folder: Path) -> None:
    """Make the checksums fit, so that the later checks have to find the damage."""
    record = load(ExportRecord, folder / RECORD)
    files = {name: file_record(folder / name) for name in list_files(folder)}
    save(ExportRecord(**{k: getattr(record, k) for k in record.__slots__} | {"files": files}), folder / RECORD)


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record_again(folder)


def test_a_sound_folder_passes_every_check(exported: Exported) -> None:
    report = verify(exported())
    assert report.complete
    assert [check.name for check in report.checks] == [
        "files",
        "headers",
        "metadata",
        "tensors",
        "values",
        "served",
        "reader",
    ]
    assert "logits within 0 of" in report.checks[-1].detail
    assert json.loads(json.dumps(report.to_dict()))["checks"][0]["outcome"] == "passed"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "tokenizer.json"])
def test_a_flipped_bit_in_any_file_is_named(damaged: Exported, name: str) -> None:
    path = damaged() / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was altered: its sha256"):
        verify(path.parent)


def test_a_shorter_file_is_named(damaged: Exported) -> None:
    path = damaged() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors has \d+ bytes, recorded are"):
        verify(path.parent)


def test_a_missing_file_is_named(damaged: Exported) -> None:
    folder = damaged()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"missing: tokenizer\.json"):
        verify(folder)


def test_an_extra_file_is_named_but_hidden_ones_are_not_ours(damaged: Exported) -> None:
    folder = damaged()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("")
    verify(folder)
    (folder / "model-00002-of-00002.safetensors").write_text("")
    with pytest.raises(ArtifactError, match="not in the record: model-00002-of-00002"):
        verify(folder)


def test_a_record_that_points_outside_is_refused(damaged: Exported) -> None:
    folder = damaged()
    rewrite_json(folder / RECORD, lambda r: r["files"].update({"../secret": r["files"]["config.json"]}))
    with pytest.raises(ArtifactError, match=r"outside the folder: '\.\./secret'"):
        verify(folder)


def test_no_folder_or_one_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="config.json: cannot be read"):
        verify(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        load_record(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="is not a folder"):
        verify(tmp_path / "absent")


def test_a_folder_of_another_tool_is_judged_by_its_tensors_and_for_each_reader(damaged: Exported) -> None:
    folder = damaged("llama", "gptq")
    tools.gptqmodel(folder)
    report = verify(folder)
    assert [(check.name, check.outcome) for check in report.checks] == [
        ("files", "not run"),
        ("headers", "passed"),
        ("metadata", "passed"),
        ("tensors", "passed"),
        ("values", "passed"),
        ("served", "passed"),
        ("reader", "not run"),
    ]
    assert "no quant_fairness.json: another tool wrote this" in report.checks[0].detail
    assert "77 modules of 4 bits, 8 in 16 bit" in report.checks[2].detail
    assert report.format == "gptq"
    readers = {entry["reader"]: entry["reads"] for entry in report.to_dict()["readers"]}
    assert readers == {"transformers": False, "vllm": True, "gptqmodel": True, "sglang": True}
    assert report.checks[-1].detail == report.problems["transformers"]


def test_a_foreign_folder_that_transformers_can_read_here_is_compared(damaged: Exported) -> None:
    folder = damaged()
    (folder / RECORD).unlink()
    report = verify(folder)
    assert "logits within 0 of" in report.checks[-1].detail
    assert report.problems["gptqmodel"] == ""


def test_a_trap_of_one_reader_fails_only_for_that_reader(damaged: Exported, fake_reader: FakeReader) -> None:
    folder = damaged("llama", "gptq")
    tools.gptqmodel(folder)
    with pytest.raises(UnsupportedModelError, match=r"transformers does not read it right.*Allowed: vllm, gptqmodel"):
        verify(folder, reader="transformers")
    assert verify(folder, reader="vllm", python=fake_reader(folder)).checks[-1].outcome == "passed"


def test_a_folder_that_no_reader_takes_right_is_an_error(damaged: Exported) -> None:
    folder = damaged("llama", "gptq")
    tools.gptqmodel(folder)
    tools.change_metadata(folder, dynamic={})
    tools.change_metadata(folder, sym=False)
    with pytest.raises(UnsupportedModelError, match="no reader reads it right.*quant-fairness repair"):
        verify(folder)


def test_a_foreign_config_must_announce_the_dtype_of_its_tensors(damaged: Exported) -> None:
    folder = damaged("llama", "gptq")
    tools.gptqmodel(folder)
    rewrite_json(folder / "config.json", lambda c: c.update(dtype="bfloat16"))
    with pytest.raises(ArtifactError, match="the tensors are float16, config.json says bfloat16"):
        verify(folder)


@pytest.mark.parametrize("reader", ["vllm", "gptqmodel"])
def test_a_real_reader_that_computes_what_the_files_say_passes(
    exported: Exported, fake_reader: FakeReader, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    folder = exported("llama", "gptq")
    python = fake_reader(folder)
    named = verify(folder, reader=reader, python=python).checks[-1]
    # The fake reader is our own model in float16, which is exactly the unit.
    assert f"{reader} 1.2.3 in float16: log-probabilities within 1.00 float16 units" in named.detail
    monkeypatch.setenv(f"QUANT_FAIRNESS_{reader.upper()}_PYTHON", str(python))
    assert verify(folder, reader=reader).checks[-1] == named


def test_transformers_is_run_elsewhere_where_it_cannot_read_the_format_here(
    exported: Exported, fake_reader: FakeReader
) -> None:
    folder = exported("llama", "gptq")
    detail = verify(folder, reader="transformers", python=fake_reader(folder)).checks[-1].detail
    assert "transformers 1.2.3 in float16: log-probabilities within 1.00" in detail


def test_a_reader_that_mixed_up_layers_is_caught(exported: Exported, fake_reader: FakeReader) -> None:
    folder = exported("llama", "gptq")

    def without_layer_10(model: PreTrainedModel) -> None:
        model.get_submodule("model.layers.10.mlp.down_proj").weight.data.zero_()

    with pytest.raises(UnsupportedModelError, match="vllm 1.2.3 computes something else than the files say"):
        verify(folder, reader="vllm", python=fake_reader(folder, without_layer_10))


def test_greedy_tokens_that_are_not_the_likeliest_are_caught(exported: Exported, fake_reader: FakeReader) -> None:
    folder = exported("llama", "gptq")
    with pytest.raises(UnsupportedModelError, match=r"greedy tokens [\de.+]+ behind"):
        verify(folder, reader="vllm", python=fake_reader(folder, likeliest=False))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo no shard >&2; exit 1", UnsupportedModelError, "vllm cannot read it; it said: no shard"),
        ("exit 0", UnsupportedModelError, "vllm cannot read it"),
        ("echo \"No module named 'vllm'\" >&2; exit 1", MissingExtraError, "has no vllm; vllm needs it. pip install"),
        ("echo 'no attribute cpu_gemm_wna16' >&2; exit 1", ConfigError, "on this machine: .* no AVX-512. That says n"),
        ("echo '[1' > $4", ArtifactError, "answered nonsense"),
        ("echo '{}' > $4", ArtifactError, "answered nonsense .'version'"),
    ],
)
def test_a_reader_that_fails_is_reported_with_its_last_words(
    exported: Exported, tmp_path: Path, script: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        verify(exported("llama", "gptq"), reader="vllm", python=executable(tmp_path / "python", script))


def test_a_python_named_relative_to_the_current_folder_is_found(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "python", """echo '{"version": 1, "methods": {}, "sequences": []}' > $4""")
    monkeypatch.chdir(tmp_path)
    assert read_with("vllm", exported("llama", "gptq"), [[1]], Path("python")).version == "1"


def test_a_reader_that_never_answers_is_given_up(exported: Exported, tmp_path: Path) -> None:
    python = executable(tmp_path / "python", "exec sleep 60")
    with pytest.raises(UnsupportedModelError, match="did not answer within 0.2 seconds"):
        read_with("vllm", exported("llama", "gptq"), [[1]], python, seconds=0.2)


def test_an_absent_reader_is_a_usage_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANT_FAIRNESS_VLLM_PYTHON", raising=False)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(MissingExtraError, match=r"vllm needs vllm.*--reader-python or QUANT_FAIRNESS_VLLM_PYTHON"):
            verify(tmp_path, reader="vllm")
    with pytest.raises(ConfigError, match="is not a Python that can be run"):
        verify(tmp_path, reader="vllm", python=tmp_path / "absent")


def test_an_altered_file_is_found_before_torch_is_imported(damaged: Exported) -> None:
    folder = damaged()
    (folder / "README.md").write_text("other")
    code = (
        "import sys; from quant_fairness_plugin.export.verify import verify\n"
        f"try: verify({str(folder)!r})\nexcept Exception as err: print(err)\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "README.md has" in done.stdout
    assert done.returncode == 0


def test_a_duplicate_key_in_a_header_is_found(damaged: Exported) -> None:
    folder = damaged()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    twice = header[:-1] + b',"lm_head.weight":' + json.dumps(json.loads(header)["lm_head.weight"]).encode() + b"}"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + length :])
    record_again(folder)
    with pytest.raises(ArtifactError, match="'lm_head.weight' is there twice"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing tensors: model\.norm\.weight"),
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight_scale"), r"missing tensors: .*up_proj\.weight_scale"),
        (lambda t: t.update({"extra": torch.zeros(2)}), "unexpected tensors: extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(33).half()}), r"model\.norm\.weight is .*expected"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"\('F32', \(32,\)\), expected \('F16'"),
        (
            lambda t: t.update({"model.norm.weight": torch.full((32,), torch.nan).half()}),
            r"model\.norm\.weight holds NaN",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight_scale": torch.full((64, 1), torch.inf).half()}),
            "weight_scale holds NaN or infinite",
        ),
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight_packed"),
            r"up_proj is 16 bit in the weight files and not in",
        ),
    ],
)
def test_a_wrong_tensor_is_named(damaged: Exported, change: Callable[[Tensors], object], message: str) -> None:
    folder = damaged()
    change_tensors(folder, change)
    with pytest.raises(ArtifactError, match=message):
        verify(folder)


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("qzeros", lambda t: torch.zeros_like(t), r"qzeros: not the zero points of a symmetric grid"),
        ("g_idx", lambda t: t.flip(0), r"g_idx: groups are permuted"),
    ],
)
def test_gptq_tensors_that_servers_cannot_read_are_named(
    damaged: Exported, suffix: str, value: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    folder = damaged("llama", "gptq")
    name = f"model.layers.2.mlp.down_proj.{suffix}"
    change_tensors(folder, lambda t: t.update({name: value(t[name])}))
    with pytest.raises(ArtifactError, match=message):
        verify(folder)


def test_metadata_is_checked(damaged: Exported) -> None:
    folder = damaged()
    rewrite_json(folder / "config.json", lambda c: c["quantization_config"]["ignore"].remove("lm_head"))
    record_again(folder)
    with pytest.raises(ArtifactError, match="takes lm_head for quantized"):
        verify(folder)


def test_the_announced_dtype_must_be_the_stored_one(damaged: Exported) -> None:
    folder = damaged()
    for dtype, message in (("bfloat16", "F16.*expected"), ("float32", "dtype 'float32'; allowed")):
        rewrite_json(folder / "config.json", lambda c, dtype=dtype: c.update(dtype=dtype))
        record_again(folder)
        with pytest.raises(ArtifactError, match=message):
            verify(folder)


def test_a_config_without_quantization_config_is_refused(damaged: Exported) -> None:
    folder = damaged()
    rewrite_json(folder / "config.json", lambda c: c.pop("quantization_config"))
    record_again(folder)
    with pytest.raises(ArtifactError, match="quant_method is 'missing'"):
        verify(folder)


def test_gptq_says_that_its_reader_was_not_run_and_what_to_install(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not missing_packages("gptq"):
        pytest.skip("optimum and gptqmodel are installed here; without them this tests the report that says so")
    monkeypatch.delenv("QUANT_FAIRNESS_GPTQMODEL_PYTHON", raising=False)
    report = verify(exported("llama", "gptq"))
    assert not report.complete
    assert [(c.name, c.outcome) for c in report.checks if c.outcome != "passed"] == [("reader", "not run")]
    assert "Transformers needs optimum and gptqmodel for gptq" in report.checks[-1].detail
    assert not any(report.problems.values())
    with pytest.raises(
        MissingExtraError, match=r"gptqmodel and optimum.*pip install torch==2\.13\.0 gptqmodel==7\.6\.0 optimum"
    ):
        verify(exported("llama", "gptq"), reader="transformers")


def test_gpt2_is_checked_but_for_a_reader_and_says_so(exported: Exported, fake_reader: FakeReader) -> None:
    folder = exported("gpt2", "compressed-tensors", "vllm")
    report = verify(folder)
    assert report.checks[-1].outcome == "not run"
    assert "garbage" in report.checks[-1].detail
    with pytest.raises(UnsupportedModelError, match="fp16-twin.*Allowed: vllm"):
        verify(folder, reader="transformers")
    assert verify(folder, reader="vllm", python=fake_reader(folder)).complete


def test_a_loader_that_fills_gaps_at_random_is_caught_by_its_own_report_and_by_its_numbers(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("gpt2", "compressed-tensors", "vllm")
    with pytest.raises(ArtifactError, match=r"missing keys: transformer\.h\.0\.attn\.c_attn\.weight"):
        compare_with_transformers(folder)
    monkeypatch.setattr("quant_fairness_plugin.checkpoint.readers.compare.check_loading_info", lambda *args: None)
    with pytest.raises(UnsupportedModelError, match="Transformers computes other logits than the files say"):
        compare_with_transformers(folder)


def test_the_reader_check_catches_one_wrong_scale(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_fairness_plugin.checkpoint import dequantize

    real, folder = dequantize.dense_weight, exported()

    def one_group_off(module: str, *given: object) -> torch.Tensor:
        weight = real(module, *given)
        if module == "model.layers.10.mlp.down_proj":
            weight[3, :32] *= 1.5
        return weight

    monkeypatch.setattr(dequantize, "dense_weight", one_group_off)
    with pytest.raises(UnsupportedModelError, match="computes other logits than the files say"):
        compare_with_transformers(folder)


def test_a_reader_that_exceeds_the_memory_budget_is_not_run_and_that_is_said(exported: Exported) -> None:
    folder = exported()
    within, beyond = (verify(folder, memory_budget=budget).checks[-1] for budget in (10**9, 1000))
    assert (within.name, within.outcome, beyond.name, beyond.outcome) == ("reader", "passed", "reader", "not run")
    assert "more than the memory budget of 1.00 KB" in beyond.detail


@pytest.mark.parametrize(("format_name", "whole"), [("compressed-tensors", False), ("fp16-twin", True)])
def test_a_reader_that_unpacks_block_by_block_needs_less_than_the_model(
    exported: Exported, format_name: str, whole: bool
) -> None:
    folder = exported("llama", format_name)
    everything = 4 * sum(parameter.numel() for parameter in bare_model(folder).parameters())
    report = verify(folder, memory_budget=everything - 1)
    assert report.checks[-1].outcome == ("not run" if whole else "passed")


def test_what_a_block_alone_has_is_gone_behind_it_and_what_blocks_share_is_not(exported: Exported) -> None:
    """Layer 0 stands in for a block that is listed twice, as in models whose blocks share weights."""
    model, again = (LlamaForCausalLM.from_pretrained(exported(), dtype=torch.float32) for _ in range(2))
    again.hf_quantizer.compressor.decompress_model(again)
    for each in (model, again):
        each.model.layers.append(each.model.layers[0])
        each.config.num_hidden_layers += 1
    expected = again(input_ids=torch.tensor([spread_ids(again.config.vocab_size, 40)]), use_cache=False).logits
    assert torch.equal(logits_block_by_block(model, "model.layers"), expected)
    held = [sum(parameter.numel() for parameter in block.parameters()) for block in model.model.layers]
    assert (held[0] > 0, held[1]) == (True, 0)


@pytest.mark.parametrize(("installed", "loads"), [("5.22.0", True), ("5.23.0", False), ("6.0.0.dev0", False)])
def test_asymmetric_compressed_tensors_are_refused_where_transformers_does_not_load_them(
    monkeypatch: pytest.MonkeyPatch, installed: str, loads: bool
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    refused = partial(find_refusal, "llama", format="compressed-tensors", grid=Grid(group_size=32, symmetric=False))
    said = str(refused(reader="transformers"))
    assert (said == "None") == loads
    assert loads or re.search(r"any from 5\.23 on; allowed are a symmetric grid, .*Use --sym, or --reader vllm", said)
    assert refused(reader="vllm") is None


def test_a_folder_that_transformers_cannot_load_is_one_line(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("sizes that\ndo not fit")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(UnsupportedModelError, match=r"does not load it \(sizes that do not fit\)\. Do not use"):
        compare_with_transformers(exported())


def test_sglang_is_judged_by_its_documented_rules_and_not_run(exported: Exported, damaged: Exported) -> None:
    report = verify(exported("llama", "gptq"))
    [entry] = [entry for entry in report.to_dict()["readers"] if entry["reader"] == "sglang"]
    assert (entry["reads"], entry["note"]) == (True, "documented rules; not run here")
    assert {entry["note"] for entry in report.to_dict()["readers"] if entry["reader"] != "sglang"} == {""}
    with pytest.raises(ConfigError, match=r"^reader 'sglang' is not run here[^\n]*transformers, vllm, gptqmodel\.$"):
        verify(exported("llama", "gptq"), reader="sglang")
    folder = damaged("llama", "gptq")
    tools.autoround_gptq(folder)  # rules for unmerged names, which SGLang does not look up
    with pytest.raises(UnsupportedModelError, match=r"sglang does not read it right: .*takes model\.layers\.1"):
        verify(folder, reader="sglang")


def test_an_unknown_reader_is_refused(exported: Exported) -> None:
    with pytest.raises(ConfigError, match="unknown reader 'tgi'; known are transformers, vllm, gptqmodel, sglang"):
        verify(exported(), reader="tgi")
