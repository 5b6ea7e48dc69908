"""What a sweep, a run and its checkpoint will take, before anything is loaded: `forecast`.

Takes a model's config, the headers of its files, its tokenizer and a text set; no weight is read. Passes, tokens and
bytes are counted, by the code that the sweep itself counts with; memory follows from shapes; time is an estimate, from
parts of the work that are timed on this machine while it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import (
    CheckpointFormat,
    Part,
    Reader,
    TextSet,
    Undefined,
)
from quant_fairness_plugin.checkpoint.formats import FORMATS
from quant_fairness_plugin.checkpoint.readers import READERS, find_refusal, takes_one_group_size
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast.commands import COMMANDS, CommandMemory
from quant_fairness_plugin.forecast.job import calibrated_tokens, count_part, memory_job, tokenize_parts
from quant_fairness_plugin.forecast.memory import Memory, in_memory, streamed
from quant_fairness_plugin.forecast.passes import (
    Range,
    Text,
    fitting_groups,
    kept_groups,
    possible_walks,
    swept_units,
    unit_map,
)
from quant_fairness_plugin.forecast.run import Run, Step
from quant_fairness_plugin.forecast.speed import Speed, measure_speed
from quant_fairness_plugin.forecast.starting import start_seconds
from quant_fairness_plugin.forecast.work import Work, count_work
from quant_fairness_plugin.measure.rows import TokenRows
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.outline import Outline, outline_model
from quant_fairness_plugin.model.resolve import ModelFiles
from quant_fairness_plugin.plans.costs import Disk, count_disk
from quant_fairness_plugin.plans.plan_set import around_plans
from quant_fairness_plugin.plans.tree import StateTree
from quant_fairness_plugin.plans.units import check_around
from quant_fairness_plugin.sweep.config import SweepConfig

__all__ = [
    "CommandMemory",
    "Disk",
    "Forecast",
    "Memory",
    "Range",
    "Speed",
    "Step",
    "Text",
    "Verdict",
    "Work",
    "forecast",
]


@dataclass(frozen=True, slots=True)
class Verdict:
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
    run: tuple[Step, ...] | Undefined
    """What `run` as it comes takes: with a plan by gradients, which sweeps nothing."""
    unplanned: tuple[Step, ...] | Undefined
    """What `quantize --protect-layers none` takes."""
    speed: Speed
    commands: tuple[CommandMemory, ...]
    """What `quantize`, `run` and `measure` take at their peaks, libraries included."""
    memory: Memory
    """Of a sweep with the whole model in memory."""
    streamed: Memory
    """Layer by layer, as under `--memory-budget`. More than the budget where that is too small."""
    disk: Disk
    readers: tuple[Verdict, ...]


def forecast(
    files: ModelFiles,
    texts: TextSet,
    config: FairConfig,
    sweep: SweepConfig = SweepConfig(),
    *,
    memory_budget: int | None = None,
    formats: Iterable[CheckpointFormat] = FORMATS,
    readers: Iterable[Reader] = READERS,
    trust_remote_code: bool = False,
) -> Forecast:
    """Return what the sweep of a model takes on this machine, and what becomes of its checkpoint.

    Every language is taken to be supported by the model: those that are not are dropped by the sweep, which is then
    shorter.

    Args:
        files: the model's files.
        texts: the whole text set; a sweep reads its `search` part.
        config: grid and protected layers; `auto` counts as none.
        sweep: which plans; a search among them is not counted.
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
    config.check_group_size(outline)
    config = config.fitted(outline, uniform=takes_one_group_size(config.format, config.reader))
    groups, trees = fitting_groups(outline, config.grid), _walks(outline, config, sweep)
    protected = check_layers(config.protect_layers, files.layers) if isinstance(config.protect_layers, tuple) else ()
    tokenized = tokenize_parts(files, outline, texts, trust_remote_code=trust_remote_code)
    text = count_part(tokenized, texts, "search")
    speed = measure_speed(
        outline, config.grid, row_tokens=text.padded // sum(rows for rows, _, _ in text.batches),
        heads=count_heads(files, outline), states=len(trees[1][1].stages[-1]),
    )  # fmt: skip
    run, precisions = _run(outline, config, texts, tokenized, speed), len(sweep.precisions)
    job, once = memory_job(files, outline, config, texts, tokenized, budget=memory_budget), run.once()
    least, most = (count_work(outline, groups, walks, text, precisions=precisions) for walks in trees)
    return Forecast(
        model=files.name, family=outline.family.name, layers=files.layers, parameters=outline.parameters,
        plans=sum(len(tree.leaves) - 1 for tree in trees[1]),
        kept_groups=kept_groups(outline, groups),
        text=text, least=least, most=most,
        seconds=Range(least.seconds(speed).low, most.seconds(speed).high),
        run=run.steps(once), unplanned=run.steps(once, planned=False), speed=speed,
        commands=tuple(map(job.memory, COMMANDS)),
        memory=in_memory(outline, groups, trees[1], text, precisions=precisions),
        streamed=streamed(outline, trees[1], text, precisions=precisions, budget=memory_budget),
        disk=count_disk(outline, config.grid, protected),
        readers=_verdicts(outline, config, formats, readers),
    )  # fmt: skip


def _run(
    outline: Outline, config: FairConfig, texts: TextSet, tokenized: Mapping[Part, TokenRows], speed: Speed
) -> Run:
    search, confirm = (count_part(tokenized, texts, part) for part in ("search", "confirm"))
    return Run(
        outline=outline, config=config, languages=texts.languages,
        calibrated=calibrated_tokens(tokenized["calibrate"], config), search=search, confirm=confirm, speed=speed,
        start=start_seconds(),
    )  # fmt: skip


def _walks(outline: Outline, config: FairConfig, sweep: SweepConfig) -> tuple[list[StateTree], list[StateTree]]:
    """Return the trees of the walks with the least and the most block passes that a sweep can come to."""
    units, quantized = unit_map(outline), config.grid.precision
    singled_out = swept_units(units, fitting_groups(outline, config.grid), sweep.granularity)
    planned = sweep.plan_set(singled_out, quantized)
    check_around(sweep.also, units, outline.shapes, config.grid)
    return possible_walks(planned, units, around_plans(sweep.also, units, singled_out, sweep.modes))


def count_heads(files: ModelFiles, outline: Outline) -> int:
    """Return the number of attention heads; one wide one where the config has no such number that fits."""
    counts = [files.config[key] for key in ("num_attention_heads", "n_head") if isinstance(files.config.get(key), int)]
    return next((heads for heads in counts if heads > 0 and outline.width % heads == 0), 1)


def _verdicts(
    outline: Outline, config: FairConfig, formats: Iterable[CheckpointFormat], readers: Iterable[Reader]
) -> tuple[Verdict, ...]:
    verdicts = []
    for form in formats:
        for reader in readers:
            refusal = find_refusal(
                outline.family, format=form, grid=config.grid, reader=reader, overrides=config.overrides
            )
            verdicts.append(Verdict(form, reader, "" if refusal is None else refusal.reason))
    return tuple(verdicts)
