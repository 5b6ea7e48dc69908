"""`--config FILE`: a flag goes before the file, the file before the default, and a bad file is one line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from quant_fairness_plugin.cli import awq_quantize, gptq_quantize
from quant_fairness_plugin.cli.config_file import read_config_file
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError

# `cli.quantize` is a function of the same name wherever the package's attribute is asked for.
quantize_module = importlib.import_module("quant_fairness_plugin.cli.quantize")


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[FairConfig]:
    """The configurations that `quantize` would have used."""
    seen: list[FairConfig] = []
    monkeypatch.setattr(quantize_module, "write_checkpoint", lambda source, config, out, **_: seen.append(config))
    monkeypatch.setattr(quantize_module, "report_checkpoint", lambda *_, **__: None)
    return seen


def run(*arguments: str | Path, program: typer.Typer = app) -> int:
    return run_guarded(typer.main.get_command(program), list(map(str, arguments)), "quant-fairness")


def write(folder: Path, name: str, document: Any) -> Path:
    path = folder / name
    path.write_text(
        json.dumps(document) if path.suffix == ".json" else yaml.safe_dump(document, sort_keys=False), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("name", ["fair.yaml", "fair.YML", "fair.json"])
def test_a_flag_goes_before_the_file_and_the_file_before_the_default(
    name: str, tmp_path: Path, configs: list[FairConfig]
) -> None:
    path = tmp_path / name
    path = write(tmp_path, name, {"group_size": 32, "protect_layers": [0, 2], "strict": True, "reference": None})
    assert run("quantize", "demo", "--config", path, "--group-size", "64", "--no-strict") == 0
    assert run("quantize", "demo", "--config", path) == 0
    # A flag with the default's value was given, too.
    assert run("quantize", "demo", "--config", path, "--group-size", "128", "--protect-layers", "auto") == 0
    assert [(config.group_size, config.protect_layers, config.strict) for config in configs] == [
        (64, (0, 2), False),
        (32, (0, 2), True),
        (128, "auto", True),
    ]
    assert [config.reference for config in configs] == [None, None, None]
    assert {config.bits for config in configs} == {4}


def test_a_whole_configuration_is_a_file(tmp_path: Path, configs: list[FairConfig]) -> None:
    whole = FairConfig(protect_units=("3.down",), languages=("en", "no"), clip="mse", max_overhead=0.1, draws=500)
    assert run("quantize", "demo", "--config", write(tmp_path, "fair.yaml", whole.to_dict())) == 0
    assert configs == [whole]


def test_a_commands_own_default_gives_way_to_the_file(tmp_path: Path, configs: list[FairConfig]) -> None:
    path = write(tmp_path, "fair.json", {"protect_layers": "auto", "method": "gptq"})
    assert run("demo", program=gptq_quantize.app) == 0
    assert run("demo", "--config", path, program=gptq_quantize.app) == 0
    assert [config.protect_layers for config in configs] == ["none", "auto"]


def test_a_command_keeps_its_method(
    tmp_path: Path, configs: list[FairConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "fair.json", {"method": "gptq"})
    assert run("demo", "--config", path, program=awq_quantize.app) == 2
    assert "fair.json: method 'gptq', but this command has 'awq'; leave method out" in capsys.readouterr().err
    assert configs == []


BAD = [
    ("fair.yaml", "colour: 1", "colour 1: Unexpected keyword argument; known names: method, bits"),
    ("fair.yaml", "draws: many", "draws 'many': Input should be a valid integer"),
    ("fair.json", '{"seed": "0"}', "seed '0': Input should be a valid integer"),
    ("fair.json", '{"bits": 3.5}', "bits 3.5 is not an integer from 2 to 8"),
    ("fair.yaml", "- bits: 4", "holds a list, not a table"),
    ("fair.json", "4", "holds a int, not a table"),
    ("fair.yaml", "", "holds nothing, not a table"),
    ("fair.yaml", "bits: [4", "is not valid YAML: while parsing a flow sequence"),
    ("fair.json", '{"bits": 4', "is not valid JSON"),
    ("fair.yaml", "seed: 1\nbits: 4\nseed: 2", "'seed' is there twice"),
    ("fair.json", '{"seed": 1, "seed": 2}', "'seed' is there twice"),
    ("fair.yaml", "texts: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ("fair.toml", "bits = 4", "neither YAML nor JSON by its name"),
    ("fair.yaml", None, "cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[f"{name} {text}" for name, text, _ in BAD])
@pytest.mark.parametrize("command", ["run", "quantize", "sweep", "plan", "measure"])
def test_a_bad_file_is_one_line(
    command: str, name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert run(command, *(["demo"] if command == "quantize" else ["--model", "demo"]), "--config", path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert str(path) in printed.err
    assert message in printed.err


def test_norwegian_is_a_language_and_not_false(tmp_path: Path) -> None:
    path = tmp_path / "fair.yaml"
    path.write_text("languages: [en, no]\nstrict: true\n", encoding="utf-8")
    assert read_config_file(path) == {"languages": ("en", "no"), "strict": True}


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fair.yaml"
    path.write_bytes(b"texts: \xff")
    with pytest.raises(ConfigError, match="fair.yaml cannot be read: .*utf-8"):
        read_config_file(path)


def test_a_sweep_takes_precisions_from_the_file_and_stability_from_itself(
    planted_model: Path, planted_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"texts": planted_file, "group_size": 32, "precisions": ["fp16", "int8"]}
    path = write(tmp_path, "fair.yaml", document)
    assert run("plan", "--model", planted_model, "--config", path, "--json") == 0
    with_int8 = json.loads(capsys.readouterr().out)["plans"]
    assert run("plan", "--model", planted_model, "--config", path, "--precisions", "fp16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plans"] < with_int8
    assert run("sweep", "--model", planted_model, "--config", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["precisions"] == ["fp16", "int8"]
