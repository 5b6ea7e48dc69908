from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
from typer.testing import CliRunner

from quant_fairness_plugin.cli.awq_quantize import app, command
from quant_fairness_plugin.config import FairConfig

# `cli.quantize` is a function of the same name wherever the package's attribute is asked for.
quantize_module = importlib.import_module("quant_fairness_plugin.cli.quantize")


@pytest.mark.parametrize(
    ("arguments", "symmetric", "protected"),
    [([], False, "none"), (["--sym"], True, "none"), (["--protect-layers", "0,2"], False, (0, 2))],
)
def test_it_quantizes_with_awq_and_protects_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], symmetric: bool, protected: object
) -> None:
    seen: list[FairConfig] = []
    monkeypatch.setattr(quantize_module, "write_checkpoint", lambda source, config, out, **_: seen.append(config))
    monkeypatch.setattr(quantize_module, "report_checkpoint", lambda *_, **__: None)
    done = CliRunner().invoke(app, ["demo", *arguments])
    assert done.exit_code == 0, done.output
    assert [config.method for config in seen] == ["awq"]
    assert seen[0].grid.symmetric is symmetric
    assert seen[0].protect_layers == protected


def test_the_method_is_no_option() -> None:
    names = inspect.signature(command).parameters
    assert "method" not in names
    assert "bits" in names
    result: Any = CliRunner().invoke(app, ["demo", "--method", "gptq"])
    assert result.exit_code == 2
