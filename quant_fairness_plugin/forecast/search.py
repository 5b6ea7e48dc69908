"""The time of a search for a plan before it begins: the least that `--time` must hold, and the whole scoring pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from quant_fairness_plugin.artifacts import Part, TextSet, Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast import count_heads
from quant_fairness_plugin.forecast.job import calibrated_tokens, count_part
from quant_fairness_plugin.forecast.passes import Range
from quant_fairness_plugin.forecast.run import STATES, Run
from quant_fairness_plugin.forecast.speed import measure_speed
from quant_fairness_plugin.measure.rows import position_limit, tokenize_for
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.sweep.memory import CONTEXT


@dataclass(frozen=True, slots=True)
class Search:
    """What a search is made of."""

    run: Run
    on_cpu: bool

    def scored(self, sentences: int) -> Range | Undefined:
        """Return the time of scoring units on so many sentences of each language."""
        if not self.on_cpu:
            return Undefined("only this machine's CPU is timed beforehand")
        if self.run.has_experts:
            return Undefined("it depends on the experts that the tokens of every language reach")
        return self.run.scored(sentences)

    def least(self, sentences: int, *, quantizes: bool) -> Range | Undefined:
        """Return the time of scoring so many, behind a quantization where one is made for it."""
        scored = self.scored(sentences)
        if isinstance(scored, Undefined) or not quantizes:
            return scored
        once = self.run.once()
        return once if isinstance(once, Undefined) else scored + once


def forecast_search(loaded: LoadedModel, texts: TextSet, config: FairConfig) -> Search:
    """Return what a search on a loaded model takes here. Parts of it are timed on the CPU, for a second or two.

    Args:
        loaded: the model, of which only shapes matter.
        texts: the whole text set; all its languages are taken to be supported.
        config: fitted to the model.
    """
    shapes = {name: tuple(value.shape) for name, value in loaded.model.named_parameters()}
    outline = Outline(loaded.family, loaded.layers, shapes, position_limit(loaded.model))
    tokenized = {
        part: tokenize_for(loaded.model, loaded.tokenizer, texts.part(part), context=CONTEXT)
        for part in get_args(Part)
        if part != "confirm"
    }
    search = count_part(tokenized, texts, "search")
    speed = measure_speed(
        outline, config.grid, row_tokens=search.padded // sum(rows for rows, _, _ in search.batches),
        heads=count_heads(loaded.files, outline), states=STATES,
    )  # fmt: skip
    run = Run(
        outline=outline, config=config, languages=texts.languages,
        calibrated=calibrated_tokens(tokenized["calibrate"], config), search=search, confirm=search, speed=speed,
    )  # fmt: skip
    return Search(run, loaded.model.device.type == "cpu")
