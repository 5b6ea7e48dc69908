"""The registry of analyses: every entry is a module with `analyse`, and options that it does not take are refused."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from quant_fairness_plugin.analysis.kinds import ANALYSES, find_analysis
from quant_fairness_plugin.analysis.request import AnalysisOptions, check_options
from quant_fairness_plugin.errors import ConfigError


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_is_a_module_and_takes_declared_options(name: str) -> None:
    module = importlib.import_module(f"quant_fairness_plugin.analysis.{name}")
    assert list(inspect.signature(module.analyse).parameters) == ["request"]
    assert set(ANALYSES[name].takes) <= {field.name for field in fields(AnalysisOptions)}
    assert ANALYSES[name].question.endswith("?")


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no analysis 'probing'; use one of weights"):
        find_analysis("probing")
    with pytest.raises(ConfigError, match="analyze weights does nothing with --gold; it takes --sweep"):
        check_options("weights", ("sweep",), AnalysisOptions(gold=Path("gold.tsv")))
