"""Backends by name, what is refused before anything is loaded, and plans in the tools' own rules."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import (
    ConfigError,
    MissingExtraError,
    ResourceError,
    UnsupportedModelError,
)
from quant_fairness_plugin.model.architectures import known_families
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.quantize.backends import (
    Job,
    backend_versions,
    check_backend,
    find_backend,
    gptqmodel,
    known_backends,
    llmcompressor,
)
from quant_fairness_plugin.quantize.backends.gptqmodel import longest_rows
from quant_fairness_plugin.quantize.backends.rules import (
    compressed_groups,
    dynamic_rules,
    gptqmodel_config,
    llmcompressor_recipe,
)
from quant_fairness_plugin.quantize.backends.running import running
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from tests.export.fake_tool import FakeTool, register

INT4, INT8 = Grid(group_size=32), Grid(group_size=32, bits=8)
BLOCKS = "model.layers"
LINEARS = tuple(f"{BLOCKS}.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "mlp.down_proj"))
OURS = (gptqmodel.GptqModelBackend(), llmcompressor.LlmCompressorBackend())


def test_our_two_backends_are_registered_as_a_third_partys_would_be() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["quant_fairness.backends"]
    for backend in OURS:
        assert points[backend.name] == f"{type(backend).__module__}:{type(backend).__name__}"
        assert backend.name in project["optional-dependencies"]


def test_a_third_party_adds_a_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = FakeTool()
    register(monkeypatch, fake=tool)
    assert known_backends() == ("native", "fake")
    assert find_backend("fake") is tool
    assert backend_versions(tool) == {"torch": torch.__version__}


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, one=FakeTool(), two=FakeTool())
    with pytest.raises(ConfigError, match="'three' is unknown; known are native, one, two"):
        check_backend("three", method="gptq", grid=INT4)


def test_a_backend_that_cannot_be_imported_is_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, broken=ModuleNotFoundError("No module named 'elsewhere'"))
    with pytest.raises(MissingExtraError, match=r"'broken' \(elsewhere:FakeTool\) cannot be imported"):
        find_backend("broken")


@pytest.mark.parametrize("backend", OURS, ids=lambda backend: backend.name)
def test_a_tool_that_is_not_installed_is_said_with_the_line_that_installs_it(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    register(monkeypatch, **{backend.name: backend})
    line = rf"pip install torch==\S+ && pip install torch==\S+ 'quant-fairness\[{backend.name}\]'"
    with pytest.raises(MissingExtraError, match=line):
        check_backend(backend.name, method="gptq", grid=INT4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn"}, "does not do 'rtn'; it does gptq, awq"),
        ({"grid": INT8}, "bits 8 cannot be handed"),
        ({"clip": "mse"}, "clip 'mse' cannot be handed"),
        ({"weighting": "minimax"}, "calibration 'minimax' cannot be handed"),
    ],
)
def test_an_option_that_a_tool_would_ignore_is_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, fake=FakeTool())
    check_backend("fake", method="gptq", grid=INT4)
    check_backend("native", **({"method": "gptq", "grid": INT4} | options))
    with pytest.raises(ConfigError, match=message):
        check_backend("fake", **({"method": "gptq", "grid": INT4} | options))


@pytest.mark.parametrize(
    ("backend", "method", "refused"),
    [
        (OURS[0], "gptq", set()),
        (OURS[0], "awq", {"gpt2", "bloom"}),
        (OURS[1], "gptq", {"gpt2"}),
        (OURS[1], "awq", {"gpt2", "bloom", "opt", "gpt_neox"}),
    ],
    ids=["gptqmodel-gptq", "gptqmodel-awq", "llmcompressor-gptq", "llmcompressor-awq"],
)
def test_families_on_which_a_tool_fails_are_refused_with_a_way_out(
    backend: Any, method: str, refused: set[str]
) -> None:
    reasons = {family: backend.refuse(family, method, INT4) for family in known_families()}
    assert {family for family, reason in reasons.items() if reason is not None} == refused
    assert all("Use --" in reason and "accepted" in reason for reason in reasons.values() if reason is not None)


def test_a_refusal_comes_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    register(monkeypatch, fake=FakeTool())
    preflight(ModelSource(str(tiny_model("llama"))), make_config(backend="fake", group_size=32))
    with pytest.raises(UnsupportedModelError, match="the fake tool cannot do opt"):
        preflight(ModelSource(str(tiny_model("opt"))), make_config(backend="fake", group_size=32))


def test_nothing_heavy_is_imported_to_find_and_ask_a_backend() -> None:
    code = (
        "import sys\n"
        "from quant_fairness_plugin.quantize.backends import gptqmodel, llmcompressor\n"
        "gptqmodel.GptqModelBackend().refuse('llama', 'awq', None)\n"
        "llmcompressor.LlmCompressorBackend().refuse('llama', 'awq', None)\n"
        "print(sorted({'torch', 'transformers', 'gptqmodel', 'llmcompressor'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_gptqmodels_awq_refuses_rows_that_it_asserts_on(tmp_path: Path) -> None:
    calibration = CalibrationSet(rows={}, source="", text_sha256="", row_tokens=2, seed=0)
    job = Job(
        source=tmp_path, dtype="float16", method="awq", grid=INT4, blocks=BLOCKS, grids={"k_proj": INT4},
        shapes={"k_proj": (96, 64)}, kept=(), calibration=calibration,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="k_proj has 96 output channels; .* multiples of 64"):
        OURS[0].quantize(job, tmp_path)


def skipped_and_bits(rules: dict[str, dict[str, int]], name: str) -> tuple[bool, int]:
    """What gptqmodel does with a module: the first rule that matches the beginning of its name counts."""
    for rule, settings in rules.items():
        if re.match(rule[2:], name):
            return rule.startswith("-:"), settings.get("bits", 4)
    return False, 4


def test_dynamic_rules_say_exactly_the_plan() -> None:
    kept = [n for n in LINEARS if ".1." in n] + [f"{BLOCKS}.3.mlp.down_proj", "lm_head"]
    wide = [n for n in LINEARS if ".2." in n] + [f"{BLOCKS}.10.self_attn.q_proj"]
    grids = {n: INT8 if n in wide else INT4 for n in LINEARS if n not in kept}
    rules = dynamic_rules(grids, kept, grid=INT4, blocks=BLOCKS)
    for name in LINEARS:
        assert skipped_and_bits(rules, name) == (name in kept, 8 if name in wide else 4), name
    assert [rule for rule in rules if rule.endswith(".*")] == [r"-:^model\.layers\.1\..*", r"+:^model\.layers\.2\..*"]
    assert skipped_and_bits(rules, "model.layers.11.mlp.down_proj") == (False, 4)


def test_dynamic_rules_say_every_modules_group_size() -> None:
    grids = {n: replace(INT8 if ".2." in n else INT4, group_size=64 if "down" in n else 32) for n in LINEARS}
    rules = dynamic_rules(grids, (), grid=INT4, blocks=BLOCKS)
    for name, own in grids.items():
        settings = next((change for rule, change in rules.items() if re.match(rule[2:], name)), {})
        assert {"bits": 4, "group_size": 32} | settings == {"bits": own.bits, "group_size": own.group_size}, name
    groups = compressed_groups(grids)
    listed = {target: group["weights"] for group in groups.values() for target in group["targets"]}
    assert {n: (w["num_bits"], w["group_size"]) for n, w in listed.items()} == {
        n: (own.bits, own.group_size) for n, own in grids.items()
    }


def test_a_configuration_of_gptqmodel_has_the_grid_and_never_permuted_groups() -> None:
    asymmetric = Grid(group_size=-1, symmetric=False)
    config = gptqmodel_config({"a": asymmetric}, (), grid=asymmetric, blocks=BLOCKS, method="awq")
    assert config == {"bits": 4, "group_size": -1, "sym": False, "dynamic": {}}
    config = gptqmodel_config({"a": INT4}, (), grid=INT4, blocks=BLOCKS, method="gptq")
    assert config == {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "dynamic": {}}


def test_a_recipe_ignores_by_full_name_and_lists_modules_where_widths_differ() -> None:
    modifiers = llmcompressor_recipe({"a": INT4, "b": INT4}, ["c", "lm_head"], method="gptq")
    [gptq] = modifiers["quantization_stage"]["quantization_modifiers"].values()
    assert gptq["ignore"] == ["c", "lm_head"]
    assert gptq["config_groups"]["group_0"]["targets"] == ["Linear"]
    wide = llmcompressor_recipe({"a": INT4, "b": INT8}, [], method="awq")["quantization_stage"][
        "quantization_modifiers"
    ]
    assert list(wide) == ["AWQModifier", "QuantizationModifier"]
    groups = wide["QuantizationModifier"]["config_groups"]
    assert {tuple(g["targets"]): g["weights"]["num_bits"] for g in groups.values()} == {("a",): 4, ("b",): 8}


def test_one_scale_per_row_is_the_strategy_channel() -> None:
    recipe = llmcompressor_recipe({"a": Grid(group_size=-1)}, [], method="gptq")
    weights = recipe["quantization_stage"]["quantization_modifiers"]["GPTQModifier"]["config_groups"]["group_0"][
        "weights"
    ]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)


def test_what_a_tool_prints_and_sets_does_not_reach_us(capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    root, threads = logging.getLogger(), torch.get_num_threads()
    before, state = (root.level, root.handlers[:]), torch.random.get_rng_state()
    with caplog.at_level(logging.DEBUG, logger="quant_fairness_plugin"), running("tool"):
        os.write(1, b"to a descriptor\n")
        sys.stdout.write("to a stream\n")
        sys.stderr.write("an error\n")
        warnings.warn("a warning", UserWarning, stacklevel=1)
        root.setLevel(logging.CRITICAL)
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float16)
        torch.manual_seed(7)
    assert capfd.readouterr() == ("", "")
    assert "tool: to a descriptor" in caplog.text
    assert (root.level, root.handlers[:]) == before
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (AssertionError(), UnsupportedModelError, r"tool failed on this model \(AssertionError: no message\)"),
        (OSError("no such model"), UnsupportedModelError, r"OSError: no such model.*--backend native"),
        (OSError(28, "No space left"), ResourceError, "No space left.*TMPDIR"),
        (MemoryError(), ResourceError, "out of memory"),
        (ConfigError("ours"), ConfigError, "^ours$"),
    ],
)
def test_a_failing_tool_is_one_of_our_errors(failure: Exception, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), running("tool"):
        raise failure


def test_memory_is_left_unpinned_on_a_cpu_only_for_a_while() -> None:
    original, tensor = torch.Tensor.pin_memory, torch.zeros(2)
    with llmcompressor._memory_not_pinned("cpu"):
        assert tensor.pin_memory() is tensor
    with llmcompressor._memory_not_pinned("cuda"):
        assert torch.Tensor.pin_memory is original
    assert torch.Tensor.pin_memory is original


def test_gptqmodels_awq_gets_rows_of_one_length_and_says_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    equal = [(1, 2, 3), (4, 5, 6)]
    assert longest_rows(equal) == equal
    assert not caplog.records
    assert longest_rows([(1, 2, 3), (7,), (4, 5, 6), (8, 9)]) == equal
    assert [record.getMessage() for record in caplog.records] == [
        "gptqmodel's AWQ needs rows of one length: 3 of 9 calibration tokens are left out"
    ]
