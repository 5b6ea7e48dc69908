"""A repaired folder is taken right by every reader, its weights are the same bytes, and nothing else is promised."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.checkpoint.folder import file_record, list_files
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.errors import ArtifactError, ConfigError, QuantFairnessError, UnsupportedModelError
from quant_fairness_plugin.export.repair import default_repaired, repair
from tests.export import foreign_folders as tools
from tests.export.conftest import Exported, rewrite_json

Tool = Callable[[Path], None]
ALL_READ = {"transformers": "", "vllm": "", "gptqmodel": "", "sglang": ""}
TOOLS: list[tuple[str, Tool]] = [
    ("gptq", tools.gptqmodel),
    ("gptq", tools.autoround_gptq),
    ("gptq", tools.autogptq),
    ("awq", tools.autoround_awq),
    ("awq", tools.autoawq),
]


def written_by(damaged: Exported, format_name: str, tool: Tool, family: str = "llama") -> Path:
    folder = damaged(family, format_name)
    tool(folder)
    return folder


def quantization(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(("format_name", "tool"), TOOLS, ids=[f"{tool.__name__}" for _, tool in TOOLS])
def test_every_reader_takes_a_repaired_folder_right(
    exported: Exported, damaged: Exported, tmp_path: Path, format_name: str, tool: Tool
) -> None:
    folder = written_by(damaged, format_name, tool)
    before = {name: file_record(folder / name) for name in list_files(folder)}
    report = repair(folder, tmp_path / "out")
    assert report.verified is not None
    assert report.verified.problems == ALL_READ
    assert {name: file_record(folder / name) for name in list_files(folder)} == before
    weights = next(name for name in before if name.endswith(".safetensors"))
    assert file_record(tmp_path / "out" / "model.safetensors") == before[weights]
    ours = read_dense_state(exported("llama", format_name))
    theirs = read_dense_state(tmp_path / "out")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    # The lists are those that our own export of the same plan has.
    own = quantization(exported("llama", format_name))
    assert {key: quantization(tmp_path / "out")[key] for key in own} == own
    side = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert {key: side[key] for key in own} == own


@pytest.mark.parametrize(("format_name", "tool"), TOOLS, ids=[f"{tool.__name__}" for _, tool in TOOLS])
def test_a_second_repair_changes_nothing(damaged: Exported, format_name: str, tool: Tool) -> None:
    folder = written_by(damaged, format_name, tool)
    assert repair(folder, in_place=True).changes
    files = {name: file_record(folder / name) for name in list_files(folder)}
    again = repair(folder, in_place=True)
    assert (again.changes, again.backups) == ((), ())
    assert {name: file_record(folder / name) for name in list_files(folder)} == files


def test_every_changed_key_is_said_with_both_values(damaged: Exported) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    report = repair(folder, dry_run=True)
    said = {(change.file, change.key): (change.before, change.after) for change in report.changes}
    lists = ("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert")
    assert set(said) == {("config.json", f"quantization_config.{key}") for key in lists} | {
        ("quantize_config.json", key) for key in lists
    }
    before, after = said["config.json", "quantization_config.dynamic"]
    assert before == {r"-:^model\.layers\.(1)\..*": {}}
    assert after == {r"-:^model\.layers\.1\..*": {}}
    assert said["config.json", "quantization_config.modules_to_not_convert"][0] == "(absent)"


def test_keys_that_no_loader_depends_on_stay(damaged: Exported, tmp_path: Path) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    repair(folder, tmp_path / "out")
    assert quantization(tmp_path / "out")["meta"] == {"quantizer": ["gptqmodel:7.6.0"]}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    old = json.loads((folder / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == {
        k: v for k, v in old.items() if k != "quantization_config"
    }


def test_a_dry_run_writes_nothing(damaged: Exported) -> None:
    folder = written_by(damaged, "gptq", tools.autogptq)
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    report = repair(folder, dry_run=True)
    assert report.changes[0].after == "model.safetensors"
    assert (report.out, report.verified) == (None, None)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert list(folder.parent.glob("*repaired*")) == []


def test_in_place_keeps_the_metadata_and_the_very_file_of_the_weights(damaged: Exported) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    old, weights = (folder / "config.json").read_bytes(), (folder / "model.safetensors").stat()
    report = repair(folder, in_place=True)
    assert report.backups == ("config.json.before-repair", "quantize_config.json.before-repair")
    assert (folder / "config.json.before-repair").read_bytes() == old
    assert (folder / "model.safetensors").stat().st_ino == weights.st_ino
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []
    tools.change_metadata(folder, dynamic={})
    assert repair(folder, in_place=True).backups == ("config.json.2.before-repair",)


def test_by_default_the_result_is_beside_with_linked_weights(damaged: Exported) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    report = repair(folder)
    out = default_repaired(folder)
    assert report.out == str(out)
    assert out.name == f"{folder.name}-repaired"
    assert (out / "model.safetensors").stat().st_ino == (folder / "model.safetensors").stat().st_ino
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_weights_are_copied_where_they_cannot_be_linked(
    damaged: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_links(*args: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    repair(folder, tmp_path / "out")
    assert file_record(tmp_path / "out" / "model.safetensors") == file_record(folder / "model.safetensors")


def test_a_wrong_dtype_and_a_wrong_grid_in_the_metadata_are_put_right(damaged: Exported, tmp_path: Path) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    rewrite_json(folder / "config.json", lambda c: c.update(dtype="bfloat16"))
    # Static act-order: the groups are in order, so that what desc_act says is not true of the files.
    tools.change_metadata(folder, desc_act=True, sym=False, group_size=64, bits=8)
    repair(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    got = quantization(tmp_path / "out")
    assert (got["desc_act"], got["sym"], got["group_size"], got["bits"]) == (False, True, 32, 4)


def test_version_2_stays_version_2(damaged: Exported, tmp_path: Path) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    tools.change_metadata(folder, checkpoint_format="gptq_v2", format="gptq_v2")
    tools.change_tensors(folder, lambda t: t.update({n: v + 0x11111111 for n, v in t.items() if n.endswith(".qzeros")}))
    report = repair(folder, tmp_path / "out")
    assert report.verified is not None
    assert report.verified.problems == ALL_READ
    assert quantization(tmp_path / "out")["checkpoint_format"] == "gptq_v2"
    assert quantization(tmp_path / "out")["format"] == "gptq_v2"


def test_what_no_metadata_can_change_is_left_to_the_report(damaged: Exported, tmp_path: Path) -> None:
    folder = damaged("bloom", "gptq")
    (folder / tools.RECORD).unlink()
    tools.change_metadata(folder, dynamic={})
    report = repair(folder, tmp_path / "out")
    assert report.verified is not None
    assert {reader for reader, text in report.verified.problems.items() if text} == {"vllm"}


def mixed_shards(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_tensors(folder, tools.keep_one_part)


def act_order(folder: Path) -> None:
    tools.gptqmodel(folder)
    name = "model.layers.2.mlp.down_proj.g_idx"
    tools.change_tensors(folder, lambda t: t.update({name: t[name].flip(0)}))


def asymmetric(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_tensors(folder, lambda t: t["model.layers.2.mlp.down_proj.qzeros"].fill_(0x66666666))


def mixed_groups(folder: Path) -> None:
    """One group of 64 in a `down`, beside groups of 32 everywhere else, and no word of it."""
    awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    (tools.autoround_awq if awq else tools.gptqmodel)(folder)

    def halve(stored: tools.Tensors) -> None:
        name = "model.layers.2.mlp.down_proj"
        for suffix in ("qzeros", "scales"):
            stored[f"{name}.{suffix}"] = stored[f"{name}.{suffix}"][:1]
        if not awq:
            stored[f"{name}.g_idx"] = torch.zeros_like(stored[f"{name}.g_idx"])

    tools.change_tensors(folder, halve)


def test_every_module_is_announced_with_its_own_group_size(damaged: Exported, tmp_path: Path) -> None:
    folder = written_by(damaged, "gptq", mixed_groups)
    report = repair(folder, tmp_path / "out")
    rules = quantization(tmp_path / "out")["dynamic"]
    assert isinstance(rules, dict)
    assert {rule: change for rule, change in rules.items() if change} == {
        r"+:^model\.layers\.2\.mlp\.down_proj$": {"group_size": 64}
    }
    assert report.verified is not None
    assert report.verified.problems == ALL_READ


def mixed_dtypes(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].bfloat16()}))


def no_norm(folder: Path) -> None:
    tools.gptqmodel(folder)
    tools.change_tensors(folder, lambda t: t.pop("model.norm.weight"))


def no_such_module(folder: Path) -> None:
    tools.gptqmodel(folder)
    name = "model.layers.2.mlp.down_proj"
    tools.change_tensors(folder, lambda t: t.update({"model.layers.2.extra.qweight": t[f"{name}.qweight"]}))


def unknown_method(folder: Path) -> None:
    tools.write(folder, {"quant_method": "hqq"})


@pytest.mark.parametrize(
    ("format_name", "edit", "error", "message"),
    [
        ("gptq", mixed_shards, UnsupportedModelError, r"mixed shards: model\.layers\.3\.self_attn\.qkv_proj"),
        ("gptq", act_order, UnsupportedModelError, "act-order .desc_act true, permuted g_idx., which vLLM refuses"),
        ("gptq", asymmetric, UnsupportedModelError, "an asymmetric gptq grid"),
        ("awq", mixed_groups, UnsupportedModelError, "has modules of several group sizes, and awq holds one"),
        ("gptq", mixed_dtypes, ArtifactError, "mixed dtypes: .*lm_head.weight is BF16"),
        ("gptq", no_norm, ArtifactError, r"missing tensors: model\.norm\.weight"),
        ("gptq", no_such_module, ArtifactError, r"layers\.2\.extra is quantized .* no such linear module"),
        ("gptq", unknown_method, UnsupportedModelError, "quant_method 'hqq'"),
        ("gptq", lambda folder: None, ArtifactError, "was written by this program"),
        ("compressed-tensors", lambda f: (f / tools.RECORD).unlink(), UnsupportedModelError, "is compressed-tensors"),
    ],
)
def test_what_cannot_be_proven_is_refused_and_nothing_is_written(
    damaged: Exported,
    tmp_path: Path,
    format_name: str,
    edit: Tool,
    error: type[QuantFairnessError],
    message: str,
) -> None:
    folder = written_by(damaged, format_name, edit)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for in_place in (False, True):
        with pytest.raises(error, match=message):
            repair(folder, None if in_place else tmp_path / "out", in_place=in_place)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_awq_of_a_family_with_scaled_activations_needs_all_of_them(damaged: Exported, tmp_path: Path) -> None:
    folder = damaged("bloom", "awq")
    (folder / tools.RECORD).unlink()
    tools.change_tensors(folder, lambda t: t.pop("transformer.h.1.mlp.gelu_impl.scales"))
    with pytest.raises(UnsupportedModelError, match=r"lacks transformer\.h\.1\.mlp\.gelu_impl\.scales"):
        repair(folder, tmp_path / "out")


def test_plain_checkpoints_and_absent_folders_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="holds no quantized modules"):
        repair(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not a folder"):
        repair(tmp_path / "absent", tmp_path / "out")


def test_an_output_that_exists_or_lies_inside_is_a_usage_error(damaged: Exported, tmp_path: Path) -> None:
    folder = written_by(damaged, "gptq", tools.gptqmodel)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        repair(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="lies inside of"):
        repair(folder, folder / "out")
    with pytest.raises(ConfigError, match="both an output"):
        repair(folder, tmp_path / "other", in_place=True)


def test_a_file_that_changes_while_it_is_copied_is_an_error(
    damaged: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quant_fairness_plugin.export import repair as module

    def other_bytes(source: Path, destination: Path) -> None:
        destination.write_bytes(source.read_bytes()[:-1] + b"\0\0")

    folder = written_by(damaged, "gptq", tools.gptqmodel)
    monkeypatch.setattr(module, "_link", other_bytes)
    with pytest.raises(ArtifactError, match="changed while it was copied"):
        repair(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_changed_and_who_reads_the_result(
    damaged: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    folder = written_by(damaged, "gptq", tools.gptqmodel)
    command = typer.main.get_command(app)
    assert run_guarded(command, ["repair", str(folder), "--dry-run"], "quant-fairness") == 0
    planned = capsys.readouterr().out
    assert "config.json: quantization_config.modules_in_block_to_quantize: (absent) → [[" in planned
    assert run_guarded(command, ["repair", str(folder), "--in-place", "--json"], "quant-fairness") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["changes"]) == len(planned.splitlines())
    assert all(entry["reads"] for entry in report["verified"]["readers"])
    assert run_guarded(command, ["repair", str(folder), "--in-place"], "quant-fairness") == 0
    assert "nothing to change" in capsys.readouterr().out
    assert run_guarded(command, ["verify", str(folder)], "quant-fairness") == 0
    assert "gptqmodel    reads    every module as it is stored" in capsys.readouterr().out
    assert run_guarded(command, ["repair", str(folder), "-o", "x", "--in-place"], "quant-fairness") == 2
    assert "both an output" in capsys.readouterr().err
