"""`quant-fairness plan`: what a run, a sweep and the checkpoint will take, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer

from quant_fairness_plugin.checkpoint.formats import FORMATS
from quant_fairness_plugin.checkpoint.readers import READERS
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.options import GRID, TEXTS, Access, Json, MemoryBudget, ModelOption
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.sweep_options import PlansOptions
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.config.option import Option
from quant_fairness_plugin.config.parsers import choice
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.sizes import parse_size
from quant_fairness_plugin.preflight import preflight


@options(config=("effort", *GRID, "protect_layers", *TEXTS, "prompts"), defaults={"protect_layers": "none"})
def plan(
    config: FairConfig,
    plans: PlansOptions,
    access: Access,
    model: ModelOption = None,
    format_: Annotated[
        str | None,
        Option(
            "Only this checkpoint format:", "Output", flag="--format", parse=choice("--format", FORMATS), names=FORMATS
        ),
    ] = None,
    reader: Annotated[
        str | None, Option("Only this reader:", "Output", parse=choice("--reader", READERS), names=READERS)
    ] = None,
    memory_budget: MemoryBudget = None,
    as_json: Json = False,
) -> None:
    """Say how long a run and a sweep take, their memory and disk, and who will load the result. Loads no model."""
    budget = None if memory_budget is None else parse_size(memory_budget)
    files, sentences = preflight(access.source(model), config)

    from quant_fairness_plugin.forecast import forecast
    from quant_fairness_plugin.forecast.report import forecast_lines

    formats = FORMATS if format_ is None else (format_,)
    expected = forecast(
        files,
        sentences,
        config,
        plans.to_sweep(config),
        memory_budget=budget,
        formats=formats,
        readers=READERS if reader is None else (reader,),
        trust_remote_code=access.trust_remote_code,
    )
    if find_architecture(str(files.config.get("model_type", ""))) is None:
        # Loads torch and Transformers, which a known family does without.
        from quant_fairness_plugin.steps import format_problems

        trust = access.trust_remote_code
        possible = [name for name in formats if any(one.format == name and not one.reason for one in expected.readers)]
        problems = format_problems(files, sentences, config, possible, trust_remote_code=trust)
        readers = tuple(replace(one, reason=one.reason or problems.get(one.format, "")) for one in expected.readers)
        expected = replace(expected, readers=readers)
    if as_json:
        typer.echo(json.dumps(asdict(expected), indent=1))
    else:
        say("\n".join(forecast_lines(expected)), indent=12)
