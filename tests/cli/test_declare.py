"""Options are declared once: what help shows is the fields, their text, their panel and their defaults."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from quant_fairness_plugin.cli import awq_quantize, gptq_quantize
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.field import declared_fields
from quant_fairness_plugin.cli.main import COMMANDS, app
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import PANELS, Option
from tests.cli.fresh import Commands, command_processes

GROUP = typer.main.get_command(app)
ALONE = {"gptq-quantize": gptq_quantize, "awq-quantize": awq_quantize}
EVERY = [*COMMANDS, *ALONE]
DECLARED = ["run", "plan", "sweep", "recommend", "measure", "quantize", "compare", "analyze", *ALONE]


def command(name: str) -> Any:
    return typer.main.get_command(ALONE[name].app) if name in ALONE else GROUP.commands[name]  # type: ignore[attr-defined]


def example(name: str) -> str:
    return str(ALONE[name].EXAMPLE) if name in ALONE else COMMANDS[name]


def shown(name: str, columns: int = 120) -> str:
    program, arguments = (ALONE[name].app, []) if name in ALONE else (app, [name])
    done = CliRunner().invoke(
        program, [*arguments, "--help"], env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}
    )
    assert done.exit_code == 0
    return done.output


def boxes(text: str) -> dict[str, list[str]]:
    """Title of each box of a help text → the long options in its first column."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.match(r"╭─ (.+?) ─", line):
            found[title[1]] = []
        elif flag := re.match(r"│ (--[\w-]+)", line):
            found[list(found)[-1]].append(flag[1])
    return found


@pytest.mark.parametrize("name", DECLARED)
def test_every_option_is_in_one_box_in_the_order_of_the_boxes(name: str) -> None:
    found = boxes(shown(name))
    titles = [title for title in found if title != "Arguments"]
    assert titles == [panel for panel in PANELS if panel in titles]
    flags = [flag for box in found.values() for flag in box]
    parameters = command(name).get_params(typer.Context(command(name)))
    assert sorted(flags) == sorted(each.opts[0] for each in parameters if each.opts[0].startswith("-"))


@pytest.mark.parametrize("name", ["run", "quantize", *ALONE])
def test_the_main_commands_have_the_five_boxes(name: str) -> None:
    assert {"What to protect", "How to quantize", "Texts", "Output", "More"} <= set(boxes(shown(name)))


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", EVERY)
def test_help_ends_with_an_example(name: str, columns: int) -> None:
    lines = " ".join(shown(name, columns).split())
    assert lines.endswith(f"Example: {' '.join(example(name).split())}")


@pytest.mark.parametrize("name", EVERY)
def test_an_example_is_a_command_line_that_is_accepted(name: str) -> None:
    words = shlex.split(example(name).partition(" >")[0])
    arguments = words[1:] if name in ALONE else words[2:]
    assert words[: len(words) - len(arguments)] == ([name] if name in ALONE else ["quant-fairness", name])
    context = command(name).make_context(name, arguments)
    assert all(value is not ... for value in context.params.values())


def test_help_and_defaults_are_those_of_the_configuration() -> None:
    parameters = {parameter.name: parameter for parameter in command("run").params}
    declared = declared_fields(FairConfig)
    for field in fields(FairConfig):
        if field.name == "quantize_rest_to":  # the research scripts' word for --bits
            assert field.name not in parameters
            continue
        option, given = declared[field.name].option, parameters[field.name]
        assert given.help.startswith(option.help)
        assert given.rich_help_panel == option.panel
        if given.default is not None:
            assert declared[field.name].parse(given.default) == field.default
        else:
            assert field.default in (None, ())


@pytest.mark.parametrize("name", [*COMMANDS])
def test_a_command_function_takes_few_parameters(name: str) -> None:
    function = getattr(importlib.import_module(f"quant_fairness_plugin.cli.{name}"), name)
    assert len(inspect.signature(inspect.unwrap(function), eval_str=True).parameters) <= 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Two options."""

    colour: Annotated[str, Option("What colour.", "More")] = "red"
    sizes: Annotated[
        tuple[int, ...], Option("Which sizes.", "Texts", parse=lambda text: tuple(map(int, text.split(","))))
    ] = (1, 2)
    unseen: int = 7


def test_a_record_and_a_declared_parameter_are_filled() -> None:
    seen: list[Any] = []
    small = typer.Typer()

    @small.command()
    @options(config=("bits",), file=False)
    def paint(config: FairConfig, record: Record, times: Annotated[int, Option("How often.", "More")] = 2) -> None:
        """Paint."""
        seen.append((config.bits, record, times))

    assert CliRunner().invoke(small, []).exit_code == 0
    assert CliRunner().invoke(small, ["--bits", "3", "--sizes", "5", "--times", "9"]).exit_code == 0
    assert seen == [(4, Record(), 2), (3, Record(sizes=(5,)), 9)]
    assert CliRunner().invoke(small, ["--unseen", "1"]).exit_code == 2
    assert CliRunner().invoke(small, ["--config", "x.yaml"]).exit_code == 2


@pytest.mark.parametrize("module", ["main", "gptq_quantize", "awq_quantize"])
def test_no_help_imports_torch(module: str) -> None:
    names = list(COMMANDS) if module == "main" else [""]
    code = (
        f"import sys, typer\nfrom quant_fairness_plugin.cli.{module} import app\n"
        f"for name in {names}:\n"
        "    command = typer.main.get_command(app)\n"
        "    command(args=[*name.split(), '--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("Example:") == len(names)
    assert out.splitlines()[-1] == "False"


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with command_processes() as started:
        yield started


COMPLETIONS = [
    ("quant-fairness me", {"measure"}),
    ("quant-fairness run --method ", {"rtn", "gptq", "awq"}),
    ("quant-fairness run --format co", {"compressed-tensors"}),
    ("quant-fairness run --reader v", {"vllm"}),
    ("quant-fairness run --protect-l", {"--protect-layers"}),
    ("quant-fairness run --langs en,h", {"en,he", "en,hi"}),
    ("quant-fairness run --reference f", {"fi", "fr"}),
    ("quant-fairness sweep --model demo --executor ", {"local", "processes", "ray"}),
    ("quant-fairness compare --calibrations english,mini", {"english,minimax"}),
    ("quant-fairness run --model d", {"demo", "demo-gpt2"}),
    ("gptq-quantize demo --clip m", {"mse", "minimax"}),
    ("awq-quantize --calibration e", {"english"}),
]


@pytest.mark.parametrize(("line", "offered"), COMPLETIONS, ids=[line for line, _ in COMPLETIONS])
def test_the_shell_completes(commands: Commands, line: str, offered: set[str], tmp_path: Path) -> None:
    words = line.split(" ")
    environment = {
        f"_{words[0].replace('-', '_').upper()}_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = commands.run(words[0], cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered
    assert done.stderr == ""
    assert not done.imported_torch


@pytest.mark.parametrize("program", [app, gptq_quantize.app, awq_quantize.app])
def test_completion_can_be_installed(program: typer.Typer) -> None:
    text = CliRunner().invoke(program, ["--help"]).output
    assert "--install-completion" in text
    assert "--show-completion" in text
