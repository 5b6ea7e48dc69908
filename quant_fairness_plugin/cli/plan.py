"""`quant-fairness plan`: what a sweep and its checkpoint will take, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Annotated

import typer

from quant_fairness_plugin.checkpoint.formats import FORMATS
from quant_fairness_plugin.checkpoint.readers import READERS
from quant_fairness_plugin.cli.options import (
    DEFAULTS,
    AllowPickle,
    Also,
    Bits,
    Combine,
    GranularityOption,
    GroupSize,
    Json,
    Languages,
    MaxPlans,
    MemoryBudget,
    Mode,
    ModelOption,
    Precisions,
    ProtectLayers,
    Reference,
    Revision,
    Symmetric,
    Texts,
    TrustRemoteCode,
    parse_also,
    parse_combine,
    parse_granularity,
    parse_integer,
    parse_languages,
    parse_modes,
    parse_precisions,
    parse_protection,
    parse_reference,
    require_model,
)
from quant_fairness_plugin.config import make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.plans.plan_set import MOST_COMBINATIONS
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.sweep.config import SweepConfig
from quant_fairness_plugin.sweep.memory import parse_size


def plan(
    model: ModelOption = None,
    langs: Languages = None,
    reference: Reference = DEFAULTS.reference or "none",
    texts: Texts = DEFAULTS.texts,
    mode: Mode = "protect-one",
    granularity: GranularityOption = "layer",
    precisions: Precisions = "fp16",
    combine: Combine = "1",
    max_plans: MaxPlans = MOST_COMBINATIONS,
    also: Also = None,
    bits: Bits = str(DEFAULTS.bits),
    group_size: GroupSize = str(DEFAULTS.group_size),
    sym: Symmetric = DEFAULTS.symmetric,
    protect_layers: ProtectLayers = "none",
    format_: Annotated[str | None, typer.Option("--format", help="Only this checkpoint format.")] = None,
    reader: Annotated[str | None, typer.Option(help="Only this reader: transformers, vllm or gptqmodel.")] = None,
    memory_budget: MemoryBudget = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Say how long a sweep takes, what memory and disk it needs, and who will load the result. Loads no model."""
    config = make_config(
        bits=parse_integer("bits", bits),
        group_size=parse_integer("group-size", group_size),
        symmetric=sym,
        protect_layers=parse_protection(protect_layers),
        languages=parse_languages(langs),
        reference=parse_reference(reference),
        texts=texts,
    )
    plans = SweepConfig(
        modes=parse_modes(mode),
        granularity=parse_granularity(granularity),
        combine=parse_combine(combine),
        max_plans=max_plans,
        precisions=parse_precisions(precisions),
        also=parse_also(also),
    )
    formats, readers = _only("format", format_, FORMATS), _only("reader", reader, READERS)
    budget = None if memory_budget is None else parse_size(memory_budget)
    source = ModelSource(require_model(model), revision, trust_remote_code, allow_pickle)
    files, sentences = preflight(source, config)

    from quant_fairness_plugin.forecast import forecast
    from quant_fairness_plugin.forecast.report import forecast_lines

    found = forecast(
        files,
        sentences,
        config,
        plans,
        memory_budget=budget,
        formats=formats,
        readers=readers,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else "\n".join(forecast_lines(found)))


def _only(option: str, name: str | None, known: Collection[str]) -> tuple[str, ...]:
    """Return all known names, or the one that the user gave."""
    if name is None:
        return tuple(known)
    if name not in known:
        raise ConfigError(f"--{option} {name!r} is unknown; use {', '.join(known)}")
    return (name,)
