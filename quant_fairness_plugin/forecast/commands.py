"""Memory of whole commands at their peaks: `quantize`, `run` and `measure` on a CPU, stage by stage.

A command holds its libraries and the tokenizer all the time; what a stage adds follows from shapes, from how many
tokens there are and from what the code of that stage holds at once. The peak is that of the largest stage. Where blocks
stay in their files, one is in memory, and the next one in 16 bit; else the model as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quant_fairness_plugin.answers.prompts import NEW_TOKENS, load_prompts
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.forecast.memory import FLOAT, ROUNDING_COPIES, fitting_weights
from quant_fairness_plugin.forecast.passes import Text, fitting_groups
from quant_fairness_plugin.model.outline import Outline, unit_shapes
from quant_fairness_plugin.plans.costs import count_disk
from quant_fairness_plugin.quantize.memory import count_quantize_needs
from quant_fairness_plugin.quantize.methods import find_method
from quant_fairness_plugin.sweep.memory import STATES_IN_MEMORY, count_needs

Command = Literal["quantize", "run", "measure"]
COMMANDS: tuple[Command, ...] = ("quantize", "run", "measure")
# What the code that does the work says itself is repeated here, as a forecast does without Transformers, which it
# loads; a test holds both against each other.
LIBRARIES = 520_000_000
"""What Python holds with torch 2.13 for a CPU, Transformers and this package, once a small model was run with them."""
TOKENIZER = 16
"""Bytes in memory for one of `tokenizer.json`: vocabulary, merges and what they are looked up with."""
PAGE = 200_000_000
"""The engine that draws the charts of a page, which `quantize` and `run` write last."""
STORED = 2
"""Bytes of a value in its file."""
CALIBRATION_TOKENS = 2048
"""Most of a batch of calibration text, and of one that is measured."""
ROWS_IN_MEMORY, MEASURED_IN_MEMORY, BUDGET_SHARE = 256 << 20, 128 << 20, 8
"""Hidden states while a model is quantized; while it is measured, there one part in so many of a budget at most."""
SERVED_TOKENS, SERVED_COPIES, SERVED_ROWS = 64, 6, 1 << 14
"""Tokens of a row whose logits are compared in two dtypes, what of them is held, and rows of the head in a piece."""
READER_TOKENS, READER_COPIES = 40, 4
PROMPT_TOKENS, PROMPT_COPIES, ANSWERS_SHARE = 64, 4, 0.25
"""Of a prompt in its chat template; copies of the logits after it; the share of a budget that may be remembered."""
GRAPH_TOKENS, GRAPH_VALUES = 256, 10
"""Tokens of a batch whose graph is held, and values of it for each output of a linear module."""
LABEL_VALUES, LABEL_COPIES, LABEL_STATES = 1 << 23, 4, 6
"""Log-probabilities at once and what of them is held, to score units; and what is held of every token meanwhile."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a command."""

    name: str
    bytes_: int
    """Beside libraries and tokenizer, at its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandMemory:
    """Bytes that a command takes at its peak."""

    command: Command
    libraries: int
    """And the tokenizer."""
    stages: tuple[Stage, ...]
    whole: bool
    """Whether the model is in memory as a whole."""

    @property
    def peak(self) -> int:
        """Everything together, resident."""
        return self.libraries + self.largest.bytes_

    @property
    def largest(self) -> Stage:
        """The stage at which the peak is."""
        return max(self.stages, key=lambda stage: stage.bytes_)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the memory of a command follows from."""

    outline: Outline
    config: FairConfig
    languages: tuple[str, ...]
    tokenizer: int
    """Bytes of `tokenizer.json`."""
    calibrated: int
    """Tokens of all languages together."""
    confirm: Text
    search: Text
    key_values: int
    """Values that a layer remembers of a token: keys and values."""
    streams: bool
    """Whether the files can be read block by block."""
    budget: int | None = None

    def memory(self, command: Command) -> CommandMemory:
        """Return what a command takes."""
        whole = self._whole(command)
        held = FLOAT * self.outline.parameters if whole else 0
        return CommandMemory(
            command=command,
            libraries=LIBRARIES + TOKENIZER * self.tokenizer,
            stages=tuple(Stage(stage.name, held + stage.bytes_) for stage in self._stages(command, whole)),
            whole=whole,
        )

    def _whole(self, command: Command) -> bool:
        if self.budget is not None:
            return False
        return not self.streams or (command != "measure" and not self.config.goes_in_blocks)

    def _stages(self, command: Command, whole: bool) -> Iterator[Stage]:
        if command != "measure":
            yield Stage("solve", self._solving())
            if self.config.protect_layers == "auto" and self.config.scores_units:
                yield Stage("score", self._scoring())
                yield Stage("try plans", self._trying())
            yield Stage("verify", self._serving())
            yield Stage("reader", self._reading())
            yield Stage("page", PAGE)
        # A checkpoint is read as a whole, too, where the model is.
        other = FLOAT * self.outline.parameters if whole else 0
        yield Stage("measure", other + self._measuring(models=3 if command == "run" else 2))
        yield Stage("prompts", other + self._answering())

    @property
    def _block(self) -> int:
        """Values of the largest block."""
        prefix, sizes = f"{self.outline.family.blocks}.", dict[str, int]()
        for name, shape in self.outline.shapes.items():
            if name.startswith(prefix):
                layer = name.removeprefix(prefix).partition(".")[0]
                sizes[layer] = sizes.get(layer, 0) + math.prod(shape)
        return max(sizes.values())

    @property
    def _feed(self) -> int:
        """Bytes of a block that is run while the next one is read."""
        return (FLOAT + STORED) * self._block

    @property
    def _widest(self) -> tuple[int, int]:
        """Outputs of all linear modules of a layer, and values of the largest matrix."""
        outline = self.outline
        layers = (unit_shapes(outline, layer) for layer in range(outline.layers))
        flat = [[shape for unit in units for shape in unit] for units in layers]
        return max(sum(rows for rows, _ in one) for one in flat), max(math.prod(s) for one in flat for s in one)

    def _solving(self) -> int:
        outline, config = self.outline, self.config
        method = find_method(config.method).at(config.effort)
        if not method.needs_calibration:
            return self._feed + ROUNDING_COPIES * FLOAT * self._widest[1]
        compares, columns = method.compares_inputs and not config.protect_columns, bool(config.protect_columns)
        units = [
            (unit.routed, shapes)
            for layer in range(outline.layers)
            for unit, shapes in zip(outline.family.units_of(layer), unit_shapes(outline, layer), strict=True)
        ]
        groups = [group for routed, shapes in units for group in ([[one] for one in shapes] if routed else [shapes])]
        share = -(-self.calibrated // len(self.languages))
        needs = count_quantize_needs(
            outline.shapes, groups, blocks=outline.family.blocks, tokens=min(CALIBRATION_TOKENS, share),
            compares=compares, columns=columns,
        )  # fmt: skip
        room = ROWS_IN_MEMORY if self.budget is None else max(0, self.budget - needs.least)
        return needs.least + min(room, FLOAT * outline.width * self.calibrated * (1 + compares))

    def _scoring(self) -> int:
        """Errors of a block in every precision, its graph for a batch, and labels of what the head says."""
        kinds = 1 + len({*self.config.menu} - {"fp16"})
        block = self._feed + FLOAT * kinds * self._block + FLOAT * GRAPH_TOKENS * GRAPH_VALUES * self._widest[0]
        states = LABEL_STATES * FLOAT * self.outline.width * self.search.padded
        return max(block, FLOAT * LABEL_COPIES * LABEL_VALUES) + states

    def _trying(self) -> int:
        kinds = 1 + len({*self.config.menu} - {"fp16"})
        needs = count_needs(self.outline.shapes, blocks=self.outline.family.blocks, precisions=kinds)
        room = STATES_IN_MEMORY if self.budget is None else max(0, self.budget - needs.least)
        return needs.least + min(room, 2 * FLOAT * self.outline.width * self.search.padded)

    def _serving(self) -> int:
        """Logits in two dtypes; and what is read of the head for them."""
        outline = self.outline
        head = (FLOAT + STORED) * min(SERVED_ROWS, outline.vocabulary) * outline.width
        return self._feed + head + FLOAT * SERVED_COPIES * SERVED_TOKENS * outline.vocabulary

    def _reading(self) -> int:
        """Transformers on the folder: its files, in float32 what is not quantized, and a block while it is unpacked."""
        outline, config = self.outline, self.config
        quantized = fitting_weights(outline, fitting_groups(outline, config.grid))
        protected = config.protect_layers if isinstance(config.protect_layers, tuple) else ()
        stored = count_disk(outline, config.grid, protected).plan
        held = stored + FLOAT * (outline.parameters - quantized) + FLOAT * self._block + 2 * FLOAT * self._widest[1]
        if self.budget is not None and held > self.budget:
            return 0  # it is left out, and said
        return held + FLOAT * READER_COPIES * READER_TOKENS * outline.vocabulary

    def _measuring(self, *, models: int) -> int:
        """Hidden states on their way through one model, and what the heads of all are given; or the scores."""
        outline, text = self.outline, self.confirm
        room = MEASURED_IN_MEMORY if self.budget is None else min(MEASURED_IN_MEMORY, self.budget // BUDGET_SHARE)
        hidden, given = (min(room, FLOAT * outline.width * tokens) for tokens in (text.padded, text.scored))
        running = FLOAT * min(CALIBRATION_TOKENS, text.padded) * self._widest[0]
        return self._feed + running + hidden + models * given

    def _answering(self) -> int:
        """What a model remembers of all prompts, a block on the longest ones, and the logits of the last tokens."""
        prompts = load_prompts(self.config.prompts)
        rows = 0 if prompts is None else sum(len(prompts.of(name, chat=True)) for name in self.languages)
        tokens = PROMPT_TOKENS + NEW_TOKENS
        cached = FLOAT * rows * tokens * self.outline.layers * self.key_values
        if self.budget is not None and cached > ANSWERS_SHARE * self.budget:
            return 0  # none is asked, and that is said
        running = FLOAT * rows * PROMPT_TOKENS * self._widest[0]
        return self._feed + cached + running + FLOAT * PROMPT_COPIES * rows * self.outline.vocabulary


def key_values(outline: Outline, config: Mapping[str, Any]) -> int:
    """Return how many values a layer remembers of a token, as its config says; twice the width where it says nothing.

    Args:
        outline: the model.
        config: of the model, or of its text part.
    """
    heads, few, size = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if not isinstance(few, int) or not isinstance(heads, int) or not few or not heads:
        return 2 * outline.width
    return 2 * few * (size if isinstance(size, int) else outline.width // heads)
