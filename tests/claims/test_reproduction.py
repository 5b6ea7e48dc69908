"""Claims run: rules against figures made by hand, commands once each, failures as findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.claims.ledger import parse_ledger, read_ledger
from quant_fairness_plugin.claims.legacy import LegacyFigures
from quant_fairness_plugin.claims.reproduction import Reproduction
from quant_fairness_plugin.cli.main import app, run_guarded
from quant_fairness_plugin.errors import ConfigError, UnsupportedModelError
from quant_fairness_plugin.measure.metrics import percent_change
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.seeds.disparity import perplexities
from quant_fairness_plugin.seeds.simulation import simulate_int4, undo_simulation
from quant_fairness_plugin.seeds.texts import LEDGER_TEXTS

Load = Callable[..., LoadedModel]


def test_a_rule_makes_the_figure_of_the_seeds_call(load: Load) -> None:
    loaded = load("gpt2", layers=12, width=8)
    weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    texts = LEDGER_TEXTS["series"]
    before = perplexities(loaded.model, loaded.tokenizer, texts)
    simulate_int4(loaded.model, {0, 11}, variant="Q3")
    after = perplexities(loaded.model, loaded.tokenizer, texts)
    undo_simulation(loaded.model)
    figures = LegacyFigures(loaded)
    assert figures.figure("Q3: 0 11 | series | degradation.he") == percent_change(before["he"], after["he"])
    english, hebrew = (percent_change(before[name], after[name]) for name in ("en", "he"))
    ratio = figures.figure("Q3: 0 11 | series | D3")
    assert ratio == hebrew / english if english > 0 else isinstance(ratio, Undefined)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize("spec", ["Q3 | series", "Q3 | novels | D3"])
def test_a_spec_that_is_none_is_refused(load: Load, spec: str) -> None:
    with pytest.raises(ConfigError, match="is no legacy figure; write RULE"):
        LegacyFigures(load("gpt2")).figure(spec)


def test_every_legacy_figure_of_the_ledger_can_be_made(load: Load) -> None:
    loaded = load("gpt2", layers=12, width=8)
    figures = LegacyFigures(loaded)
    for spec in {claim.legacy for claim in read_ledger().claims.values()} - {""}:
        figures.figure(spec)


class Fixed:
    """Stands for the figures of a model."""

    def figure(self, spec: str) -> float:
        if spec.startswith("Q9"):
            raise ConfigError("no such rule")
        return 2.0


def reproduction(answers: dict[str, str], calls: list[list[str]]) -> Reproduction:
    commands = {"sweep": {"line": "sweep {model} -o {work}/s"}, "top": {"line": "top {work}/s", "after": ["sweep"]}}
    claim = {"says": "x", "origin": "typed", "here": "works", "command": "top", "path": "n"}
    claims = [{"id": "A", **claim}, {"id": "B", **claim, "legacy": "Q3 | ten | D1"}]

    def run(arguments: list[str]) -> str:
        calls.append(arguments)
        if arguments[0] not in answers:
            raise UnsupportedModelError("no such model")
        return answers[arguments[0]]

    ledger = parse_ledger({"commands": commands, "claims": claims})
    return Reproduction(ledger, run, Fixed(), {"model": "a m", "work": "w"})


def test_a_command_runs_once_and_after_what_it_reads() -> None:
    calls: list[list[str]] = []
    made = reproduction({"sweep": "", "top": '{"n": 3}'}, calls)
    findings = [made.reproduce(claim) for claim in made.ledger.claims.values()]
    assert calls == [["sweep", "a m", "-o", "w/s"], ["top", "w/s"]]
    assert [(row.rigorous_text, row.legacy_text, row.exit_code) for row in findings] == [
        ("n: 3", "", 0),
        ("n: 3", "2", 0),
    ]


def test_a_command_that_fails_is_a_finding_with_its_exit_code() -> None:
    calls: list[list[str]] = []
    made = reproduction({"top": ""}, calls)
    for claim in made.ledger.claims.values():
        row = made.reproduce(claim)
        assert (row.here, row.exit_code, row.rigorous_text) == ("failed", 3, "failed: no such model")
    assert calls == [["sweep", "a m", "-o", "w/s"]]


def test_a_rule_that_fails_leaves_the_figure_undefined() -> None:
    made = reproduction({"sweep": "", "top": '{"n": 3}'}, [])
    row = made.reproduce(replace(made.ledger.claims["B"], legacy="Q9 | ten | D1"))
    assert (row.legacy, row.legacy_text, row.exit_code) == (Undefined("no such rule"), "undefined", 0)


def test_the_command_prints_one_document_and_a_table(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        return run_guarded(typer.main.get_command(app), ["reproduce", *arguments], "quant-fairness")

    model = str(tiny_model("llama", layers=3))
    assert run("S3-19", "S2-7", "--model", model, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)["findings"]
    assert (first["exit_code"], first["rigorous"][0].split()[0]) == (0, "quantdisparity2026")
    assert (second["exit_code"], second["here"]) == (None, "lacks")
    assert run("S2-7", "--model", model) == 0
    assert "lacks" in capsys.readouterr().out
    assert run("S9-9") == 2
    assert "there is no claim 'S9-9'" in capsys.readouterr().err
