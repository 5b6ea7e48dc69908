"""A plan in other tools' words: what each is told about every module, and plans that a tool has no words for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from quant_fairness_plugin.artifacts import Grid, Precision, ProtectionPlan
from quant_fairness_plugin.cli import recommend as command
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.model.resolve import ModelFiles, resolve_model
from quant_fairness_plugin.recommend.tools import plan_for_tool

LAYERS = 12
UNITS: dict[str, Precision] = {"layers.1": "fp16", "layers.2": "int8", "layers.3.down": "fp16"}
SEVEN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj") + (
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def plan_of(units: dict[str, Precision], *, layers: int = LAYERS, group_size: int = 32) -> ProtectionPlan:
    return ProtectionPlan(
        model="tiny",
        units={f"layers.{i}": "int4" for i in range(layers)} | units,  # type: ignore[arg-type]
        grid=Grid(group_size=group_size),
        source="explicit",
        reasons=("chosen",),
        stable=True,
        predicted=True,
        extra_bytes=0,
        overhead=0.0,
    )


def bits_of(layer: int, name: str) -> int:
    """What `UNITS` say, written out once more."""
    if layer == 1 or (layer, name) == (3, "mlp.down_proj"):
        return 16
    return 8 if layer == 2 else 4


EXPECTED = {f"model.layers.{i}.{name}": bits_of(i, name) for i in range(LAYERS) for name in SEVEN}


def test_tools_are_told_every_units_group_size(files: Callable[..., ModelFiles]) -> None:
    """Of width 96 `down` has 192 input channels, groups of 64; all others have groups of 32."""
    here, plan = files(width=96), plan_of({}, group_size=64)
    small = {name for name in EXPECTED if "down" not in name}
    config = json.loads(plan_for_tool("gptqmodel", plan, here))
    sizes = {
        name: next((s["group_size"] for rule, s in config["dynamic"].items() if re.match(rule[2:], name)), 64)
        for name in EXPECTED
    }
    assert sizes == {name: 32 if name in small else 64 for name in EXPECTED}
    assert json.loads(plan_for_tool("autoround", plan, here)) == dict.fromkeys(small, {"group_size": 32})
    with pytest.raises(
        UnsupportedModelError, match="one group size .* take 32, 64. Make the plan with --group-size 32"
    ):
        plan_for_tool("optimum", plan, here)


@pytest.fixture
def files(tiny_model: Callable[..., Path]) -> Callable[..., ModelFiles]:
    return lambda family="llama", **sizes: resolve_model(str(tiny_model(family, **({"layers": LAYERS} | sizes))))


def test_gptqmodel_is_told_every_modules_bits(files: Callable[..., ModelFiles]) -> None:
    config = json.loads(plan_for_tool("gptqmodel", plan_of(UNITS), files()))

    def bits(name: str) -> int:
        for rule, settings in config["dynamic"].items():
            if re.match(rule[2:], name):
                return 16 if rule.startswith("-:") else int(settings["bits"])
        return int(config["bits"])

    assert {name: bits(name) for name in EXPECTED} == EXPECTED
    assert (config["group_size"], config["sym"], config["desc_act"]) == (32, True, False)


def test_llmcompressor_is_told_every_modules_bits(files: Callable[..., ModelFiles]) -> None:
    recipe = yaml.safe_load(plan_for_tool("llmcompressor", plan_of(UNITS), files()))
    scheme = recipe["quantization_stage"]["quantization_modifiers"]["GPTQModifier"]
    told = {name: g["weights"]["num_bits"] for g in scheme["config_groups"].values() for name in g["targets"]}
    assert told | dict.fromkeys(scheme["ignore"], 16) == EXPECTED | {"lm_head": 16}


def test_autoround_is_told_what_differs_from_its_scheme(files: Callable[..., ModelFiles]) -> None:
    config = json.loads(plan_for_tool("autoround", plan_of(UNITS), files()))
    assert config == {name: {"bits": bits} for name, bits in EXPECTED.items() if bits != 4}


def test_llamacpp_gets_arguments_whose_patterns_match_the_plans_tensors_only(files: Callable[..., ModelFiles]) -> None:
    words = shlex.split(plan_for_tool("llama.cpp", plan_of(UNITS), files()))
    assert set(words[::2]) == {"--tensor-type"}
    rules = [word.rsplit("=", 1) for word in words[1::2]]
    types = {16: "f16", 8: "q8_0", 4: None}
    names = dict(
        zip(SEVEN, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True)
    )
    for layer in range(LAYERS):
        for name, own in names.items():
            found = [kind for pattern, kind in rules if re.search(pattern, f"blk.{layer}.{own}.weight")]
            assert (found or [None])[-1] == types[bits_of(layer, name)], (layer, own)
        for other in ("attn_norm", "ffn_norm"):
            assert not any(re.search(pattern, f"blk.{layer}.{other}.weight") for pattern, _ in rules)


def test_a_bfloat16_model_stays_one_in_llamacpp(files: Callable[..., ModelFiles]) -> None:
    assert "=bf16" in plan_for_tool("llama.cpp", plan_of(UNITS), files(dtype="bfloat16"))


def test_mlx_is_told_every_module_that_it_would_treat_otherwise(files: Callable[..., ModelFiles]) -> None:
    table = json.loads(plan_for_tool("mlx", plan_of(UNITS), files()))
    assert (table["bits"], table["group_size"]) == (4, 32)
    bits = {name: table[name]["bits"] if table.get(name) else 16 if name in table else 4 for name in EXPECTED}
    assert bits == EXPECTED
    assert table["model.embed_tokens"] is table["lm_head"] is False


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_llamacpp_knows_merged_attention(family: str, files: Callable[..., ModelFiles]) -> None:
    text = plan_for_tool("llama.cpp", plan_of({"layers.1": "fp16"}), files(family))
    assert shlex.split(text) == ["--tensor-type", r"^blk\.1\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$=f16"]


def test_optimum_takes_plans_that_are_the_same_in_every_layer(files: Callable[..., ModelFiles]) -> None:
    everywhere: dict[str, Precision] = {f"layers.{i}.down": "fp16" for i in range(LAYERS)}
    config = json.loads(plan_for_tool("optimum", plan_of(everywhere), files()))
    assert [name for names in config.pop("modules_in_block_to_quantize") for name in names] == list(SEVEN[:-1])
    assert config == {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@pytest.mark.parametrize("units", [{"layers.1": "fp16"}, {"layers.1": "int8"}])
def test_optimum_cannot_skip_a_layer_and_says_what_to_do(
    units: dict[str, Precision], files: Callable[..., ModelFiles]
) -> None:
    with pytest.raises(UnsupportedModelError, match="relative to the block.*Use --as gptqmodel"):
        plan_for_tool("optimum", plan_of(units), files())


@pytest.mark.parametrize(
    ("tool", "family", "message"),
    [
        ("llmcompressor", "gpt2", "gpt2 has Conv1D"),
        ("mlx", "gpt2", "gpt2 has Conv1D"),
        ("llama.cpp", "opt", "tensors of 'opt' are not known"),
    ],
)
def test_a_family_that_a_tool_does_not_have_is_refused(
    tool: Any, family: str, message: str, files: Callable[..., ModelFiles]
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        plan_for_tool(tool, plan_of({"layers.1": "fp16"}), files(family))


def test_modules_that_the_grid_does_not_fit_are_left_alone(files: Callable[..., ModelFiles]) -> None:
    odd = files(width=48)  # 48 input channels are no multiple of 32, the 96 of down_proj are
    config = json.loads(plan_for_tool("autoround", plan_of({}), odd))
    assert {name for name, told in config.items() if told == {"bits": 16}} == {
        name for name in EXPECTED if not name.endswith("down_proj")
    }


def test_a_plan_of_another_model_is_an_error(files: Callable[..., ModelFiles]) -> None:
    with pytest.raises(ConfigError, match=r"plan is for 3 layers, .* has 12; .*--model"):
        plan_for_tool("gptqmodel", plan_of({}, layers=3), files())


def test_recommend_prints_the_configuration_and_nothing_else(
    files: Callable[..., ModelFiles],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load", lambda kind, path: None)
    monkeypatch.setattr(command, "recommend_plan", lambda report, limit, **options: plan_of({"layers.1": "fp16"}))
    report, model = str(tmp_path / "sweep.json"), str(files().folder)
    group = typer.main.get_command(app)
    arguments = ["recommend", report, "--model", model, "--as", "gptqmodel"]
    assert run_guarded(group, arguments, "quant-fairness") == 0
    printed = capsys.readouterr()
    assert list(json.loads(printed.out)["dynamic"]) == [r"-:^model\.layers\.1\..*"]
    assert run_guarded(group, [*arguments, "--json"], "quant-fairness") == 2
    assert "--as and --json exclude each other" in capsys.readouterr().err
    assert run_guarded(group, ["recommend", report, "--as", "gptqmodel"], "quant-fairness") == 2
    assert "the report only says 'tiny'" in capsys.readouterr().err
    assert run_guarded(group, ["recommend", report, "--as", "what"], "quant-fairness") == 2
    known = "gptqmodel, llmcompressor, autoround, optimum, llama.cpp or mlx"
    assert f"--as 'what' is unknown; use {known}" in capsys.readouterr().err
