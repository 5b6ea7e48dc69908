"""What a sweep and the checkpoint after it will take, before anything is loaded: `forecast`.

Takes a model's config, the headers of its files, its tokenizer and a text set; no weight is read. Passes, tokens and
bytes are counted, by the code that the sweep itself counts with; memory follows from shapes; time is an estimate, from
parts of the work that are timed on this machine while it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from quant_fairness_plugin.artifacts import (
    CheckpointFormat,
    Granularity,
    Mode,
    Precision,
    Reader,
    TextSet,
    precision_of_bits,
)
from quant_fairness_plugin.checkpoint.formats import FORMATS
from quant_fairness_plugin.checkpoint.readers import READERS, find_refusal
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast.memory import Memory, in_memory, streamed
from quant_fairness_plugin.forecast.passes import (
    Range,
    Text,
    count_text,
    fitting_groups,
    plan_set,
    possible_walks,
    unit_map,
)
from quant_fairness_plugin.forecast.speed import Speed, measure_speed
from quant_fairness_plugin.forecast.work import Work, count_work
from quant_fairness_plugin.measure.rows import tokenize
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.outline import Outline, outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.model.tokenizer import counting_tokenizer
from quant_fairness_plugin.plans.costs import Disk, count_disk
from quant_fairness_plugin.plans.plan_set import (
    MOST_COMBINATIONS,
    around_plans,
    check_around,
    check_plans,
    check_precisions,
)
from quant_fairness_plugin.sweep.memory import BATCH_TOKENS, CONTEXT

__all__ = ["Disk", "Forecast", "Memory", "Range", "Reading", "Speed", "Text", "Work", "forecast"]


@dataclass(frozen=True, slots=True)
class Reading:
    """Whether a reader will load the checkpoint in a format."""

    format: CheckpointFormat
    reader: Reader
    reason: str
    """Why not; empty where it will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is known beforehand."""

    model: str
    family: str
    layers: int
    parameters: int
    plans: int
    """The 16-bit model not counted."""
    kept_groups: tuple[str, ...]
    """Fusion groups that the grid does not fit: 16 bit in every plan."""
    text: Text
    least: Work
    most: Work
    """The same as `least`, but where only sets of leading units are evaluated: it depends on which units lead."""
    seconds: Range
    """Of the block passes, the head and the rounding; without loading the model, and without the statistics."""
    speed: Speed
    memory: Memory
    """With the whole model in memory."""
    streamed: Memory
    """Layer by layer, as under `--memory-budget`. More than the budget where that is too small."""
    disk: Disk
    readers: tuple[Reading, ...]


def forecast(
    files: ModelFiles,
    texts: TextSet,
    config: FairConfig,
    *,
    modes: Sequence[Mode] = ("protect-one",),
    granularity: Granularity = "layer",
    combine: int = 1,
    max_plans: int = MOST_COMBINATIONS,
    precisions: Sequence[Precision] = ("fp16",),
    also: Sequence[str] = (),
    memory_budget: int | None = None,
    formats: Iterable[CheckpointFormat] = FORMATS,
    readers: Iterable[Reader] = READERS,
    trust_remote_code: bool = False,
) -> Forecast:
    """What the sweep of a model takes on this machine, and what becomes of its checkpoint.

    Every language is taken to be supported by the model: those that are not are dropped by the sweep, which is then
    shorter.

    Args:
        files: the model's files.
        texts: the whole text set; a sweep reads its `search` part.
        config: grid and protected layers; `auto` counts as none.
        modes: as for the sweep.
        granularity: as for the sweep.
        combine: as for the sweep.
        max_plans: as for the sweep.
        precisions: as for the sweep.
        also: as for the sweep.
        memory_budget: bytes that a streamed sweep may take.
        formats: checkpoint formats to look at.
        readers: readers to look at.
        trust_remote_code: build an unknown architecture, or its tokenizer, with code that its folder brings.

    Raises:
        ConfigError: a grid that fits no weight, or plans that cannot be made.
        InvalidLayerError: protected layers that the model lacks.
        UnsupportedModelError: an architecture that is not supported.
        ArtifactError: a tokenizer that does not load, or pickled weights.
    """
    outline = outline_model(files, trust_remote_code=trust_remote_code)
    groups, units = fitting_groups(outline, config.grid), unit_map(outline)
    planned = plan_set(
        units,
        groups,
        modes=modes,
        granularity=granularity,
        combine=combine,
        max_plans=max_plans,
        quantized=precision_of_bits(config.bits),
        precisions=precisions,
    )
    check_precisions(precisions, modes, planned.quantized)
    check_plans(modes, planned.units, combine, max_plans)
    protected = check_layers(config.protect_layers, files.layers) if isinstance(config.protect_layers, tuple) else ()
    check_around(also, units, outline.shapes, config.grid)
    further = around_plans(also, units, planned.units, modes, planned.quantized)
    least, most = possible_walks(planned, units, {plan.name: plan.quantized for plan in further})
    text = _read_text(files, outline, texts.part("search"), trust_remote_code)
    speed = measure_speed(
        outline, config.grid, row_tokens=text.padded // sum(rows for rows, _, _ in text.batches),
        heads=_heads(files, outline), states=len(most[1].stages[-1]),
    )  # fmt: skip
    works = [count_work(outline, groups, trees, text, precisions=len(precisions)) for trees in (least, most)]
    return Forecast(
        model=files.name,
        family=outline.family.name,
        layers=files.layers,
        parameters=outline.parameters,
        plans=sum(len(tree.leaves) - 1 for tree in most),
        kept_groups=tuple(unit.name for unit in outline.family.units if unit.name not in groups),
        text=text,
        least=works[0],
        most=works[1],
        seconds=Range(works[0].seconds(speed).low, works[1].seconds(speed).high),
        speed=speed,
        memory=in_memory(outline, groups, most, text, precisions=len(precisions)),
        streamed=streamed(outline, most, text, precisions=len(precisions), budget=memory_budget),
        disk=count_disk(outline, config.grid, protected),
        readers=_readings(outline, config, formats, readers),
    )


def _read_text(files: ModelFiles, outline: Outline, texts: TextSet, trust_remote_code: bool) -> Text:
    tokenizer = counting_tokenizer(files, trust_remote_code=trust_remote_code)
    tokenized = tokenize(cast(Any, tokenizer), texts, context=min(CONTEXT, outline.positions))
    return count_text(tokenized, texts, batch_tokens=BATCH_TOKENS)


def _heads(files: ModelFiles, outline: Outline) -> int:
    """Attention heads; one wide one where the config has no such number that fits."""
    found = [files.config[key] for key in ("num_attention_heads", "n_head") if isinstance(files.config.get(key), int)]
    return next((heads for heads in found if heads > 0 and outline.width % heads == 0), 1)


def _readings(
    outline: Outline, config: FairConfig, formats: Iterable[CheckpointFormat], readers: Iterable[Reader]
) -> tuple[Reading, ...]:
    found = []
    for form in formats:
        for reader in readers:
            refusal = find_refusal(
                outline.family, format=form, grid=config.grid, reader=reader, overrides=config.overrides
            )
            found.append(Reading(form, reader, "" if refusal is None else refusal.reason))
    return tuple(found)
