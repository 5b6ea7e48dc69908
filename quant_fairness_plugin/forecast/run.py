"""The time of a whole `run` with its default plan: what each step does, counted, at the speed that was measured.

Counted is what takes most of the time: starting Python, tokens through blocks and head, second moments, the solver.
Left out are reading files and choosing among plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from quant_fairness_plugin.answers.prompts import NEW_TOKENS, load_prompts
from quant_fairness_plugin.artifacts import Undefined
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast.memory import fitting_weights
from quant_fairness_plugin.forecast.passes import Range, Text, fitting_groups
from quant_fairness_plugin.forecast.solving import Solving, measure_solving
from quant_fairness_plugin.forecast.speed import NOTHING, Speed
from quant_fairness_plugin.model.outline import Outline, unit_shapes
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.recommend.estimated import NEIGHBOURS
from quant_fairness_plugin.sweep.sampling import BACKWARD_STEPS, EXACT_SENTENCES, SENTENCES

STATES = 3
"""That are measured together: 16 bit, without protection, and the checkpoint."""
READINGS = Range(2.0, 8.0)
"""How often a weight is made from its integers while a checkpoint is written, checked and read: by the reader that is
run, by ours in float32 and in the dtype of the config."""
PROMPT_TOKENS = 24
HEAD_BACK = 4
"""What scoring one token takes with the way back for two labels, in tokens that are scored."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a run."""

    name: str
    seconds: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run is made of."""

    outline: Outline
    config: FairConfig
    languages: tuple[str, ...]
    calibrated: int | None
    """Tokens that are calibrated on, all languages together; None where that is not known before."""
    search: Text
    confirm: Text
    speed: Speed
    start: float = 0.0
    """Seconds that Python takes to import what a run does; 0 where that is done."""

    def steps(self, once: Range | Undefined, *, planned: bool = True) -> tuple[Step, ...] | Undefined:
        """Return the steps in their order, or why their time is not known.

        Args:
            once: what a quantization takes, of `once`.
            planned: of `run --protect-layers auto`; else of `quantize --protect-layers none`.
        """
        if isinstance(once, Undefined):
            return once
        return tuple(self._planned(once) if planned else self._unplanned(once))

    def once(self) -> Range | Undefined:
        """Return the time of one quantization, with the solver timed now, or why it is not known."""
        if not find_method(self.config.method).timed or self.config.backend != NATIVE:
            return Undefined(f"only the time of our own GPTQ is forecast, not that of {self.config.method}")
        if self.has_experts:
            return Undefined("it depends on the experts that the tokens of every language reach")
        if self.calibrated is None:
            return Undefined("it depends on how much the calibration texts hold; say so with --tokens-per-language")
        solving = measure_solving(self.outline, self.config.grid, self.config.effort)
        return self._quantized(solving, self.calibrated)

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        layers = range(self.outline.layers)
        return any(group.routed for layer in layers for group in self.outline.family.units_of(layer))

    def _planned(self, quantized: Range) -> Iterator[Step]:
        yield from self._started()
        yield Step("quantize twice", quantized.times(2))  # to score the errors, and by the plan
        yield Step("score", self.scored(self.config.sentences or SENTENCES))
        yield Step("try plans", self._tried())
        yield from self._checked(STATES)

    def _started(self) -> Iterator[Step]:
        if self.start:
            seconds = self.start * self.speed.shared
            yield Step("start", Range(seconds, seconds))

    def _unplanned(self, quantized: Range) -> Iterator[Step]:
        yield from self._started()
        yield Step("quantize", quantized)
        yield from self._checked(STATES - 1)

    def _checked(self, states: int) -> Iterator[Step]:
        yield Step("write and verify", self._read())
        yield Step("measure", self._passed(self.confirm, 1.0, passes=states, states=states))
        if prompts := self._prompts():
            yield Step("prompts", prompts)

    def _quantized(self, solving: Solving, calibrated: int) -> Range:
        """Return the time of one quantization.

        Calibration tokens go up to every fusion group and behind the block; then come moments and solutions.
        """
        outline, total = self.outline, NOTHING
        method = find_method(self.config.method).at(self.config.effort)
        models = 2 if method.compares_inputs else 1  # the 16-bit one as well
        for layer in range(outline.layers):
            passes, done, sizes = 1.0, 0, unit_shapes(outline, layer)
            for group in sizes:
                passes += done / sum(sum(map(math.prod, shapes)) for shapes in sizes)
                done += sum(map(math.prod, group))
                total += self._flops(_moment_flops(group, calibrated, models))
                total = sum((solving.of(*shape) for shape in group), total)
            total += self.speed.block.times(calibrated * passes * models)
        return total

    def scored(self, sentences: int) -> Range:
        """Return the time of scores: which languages the model knows, then gradients along the errors of every unit.

        Args:
            sentences: of each language, whose gradients are taken.
        """
        kinds = len({*self.config.menu, self.config.grid.precision} - {"fp16"})
        share = self._share(sentences)
        weights = fitting_weights(self.outline, fitting_groups(self.outline, self.config.grid))
        found = self._passed(self.search, 1.0, passes=1, states=1)
        found += self._passed(self.search, share, passes=1 + BACKWARD_STEPS + kinds, states=HEAD_BACK)
        return found + self.speed.rounding.times(kinds * weights)

    def _tried(self) -> Range:
        """The plan and its neighbours, which share the blocks before the first difference."""
        share = self._share(self.config.sentences or EXACT_SENTENCES)
        least, most = (
            self._passed(self.search, share, passes=plans, states=plans + 1) for plans in (2, 2 + NEIGHBOURS)
        )
        return Range(least.low, most.high)

    def _read(self) -> Range:
        once = self.speed.rounding.times(self.outline.parameters)
        return Range(READINGS.low * once.low, READINGS.high * once.high)

    def _prompts(self) -> Range | None:
        """Both models write, all prompts together."""
        prompts = load_prompts(self.config.prompts)
        if prompts is None:
            return None
        rows = sum(len(prompts.of(language, chat=True)) for language in self.languages)
        tokens = 2 * rows * (PROMPT_TOKENS + NEW_TOKENS)
        return self.speed.few.times(tokens * self.outline.layers) + self.speed.head.times(tokens)

    def _passed(self, text: Text, share: float, *, passes: float, states: int) -> Range:
        """A share of a text through all blocks so many times, and through the head once a state."""
        blocks = self.speed.block.times(share * text.padded * self.outline.layers * passes)
        return blocks + self.speed.head.times(share * text.scored * states)

    def _share(self, sentences: int) -> float:
        """So many sentences of each language, as a share of the search part."""
        return min(1.0, sentences / self.search.sentences)

    def _flops(self, count: float) -> Range:
        return Range(count / self.speed.flops.high, count / self.speed.flops.low)


def _moment_flops(group: list[tuple[int, int]], tokens: int, models: int) -> float:
    """Of the moments of a group's inputs, and of the output energy, which is in float64 and so counts twice."""
    columns = group[0][1]
    return 2 * models * tokens * columns**2 + sum(2 * 2 * rows * columns**2 for rows, _ in group)
