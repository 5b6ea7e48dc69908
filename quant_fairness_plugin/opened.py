"""A model, its texts and a configuration, opened together; and what the steps of the line remember for each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from quant_fairness_plugin import steps
from quant_fairness_plugin.artifacts import (
    ProtectionPlan,
    SweepReport,
    TextSet,
    UnitScores,
)
from quant_fairness_plugin.config import FairConfig, FairOptions
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.preflight import Checked, ModelSource, configure, preflight
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.workplace import Workplace
from quant_fairness_plugin.sweep.sampling import SearchTime

Progress = Callable[[str, int, int], None]
"""Called with (step, done, in all)."""


class Opened:
    """What every step of `FairQuantizer` works on, and the results of the steps before it."""

    def __init__(
        self,
        loaded: LoadedModel,
        texts: TextSet,
        config: FairConfig,
        *,
        progress: Progress | None = None,
        memory_budget: int | None = None,
        work: Path | None = None,
    ) -> None:
        steps.check_config(config, loaded)
        self.loaded, self.texts, self.config = loaded, texts, steps.fit_config(config, loaded)
        self._progress = progress or (lambda step, done, total: None)
        self._place = Workplace(folder=work, memory_budget=memory_budget)
        self._report: SweepReport | None = None
        self._bank: Path | None = None
        self._scores: UnitScores | None = None
        self._bare: QuantizedModel | None = None
        self._plan: ProtectionPlan | None = None
        self._quantized: QuantizedModel | None = None
        self._exported: Path | None = None
        self._tried = False
        self._clock: Callable[[], float] = time.monotonic
        self._search: SearchTime | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: FairConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        progress: Progress | None = None,
        **options: Unpack[FairOptions],
    ) -> Self:
        """Load a model by name, or copy one in memory, and load the texts; check first all that can be known before.

        Args:
            model: `demo`, `demo-gpt2`, a Hub id, a folder or a `.safetensors` file; or a model of Transformers, 16 or
                32 bit, which is not changed.
            tokenizer: of a model in memory; a model by name brings its own.
            config: a complete configuration; or give single `options`, the fields of `FairConfig`.
            revision: commit of a Hub model.
            trust_remote_code: run code that the model's folder brings.
            allow_pickle: read pickle weights where there are no others.
            progress: called with (step, done, in all).
            **options: fields of `FairConfig`; `texts`, a text set or the name of one, also beside a `config`.

        Raises:
            QuantFairnessError: one of its kinds, before the weights are read wherever that is possible.
        """
        complete, text_set = configure(config, options)
        source = ModelSource(str(model), revision, trust_remote_code, allow_pickle)
        if isinstance(model, str | Path):
            source.check_tokenizer(tokenizer)
            return cls.from_source(source, complete, texts=text_set, progress=progress)
        source.check_in_memory()
        loaded, sentences = steps.open_in_memory(model, tokenizer, complete, text_set)
        return cls(loaded, sentences, complete, progress=progress)

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        config: FairConfig,
        *,
        texts: TextSet | None = None,
        checked: Checked | None = None,
        progress: Progress | None = None,
        place: Workplace | None = None,
        stream: bool = False,
    ) -> Self:
        """Load a model by name from a complete source and configuration; see `from_pretrained`.

        With a memory budget (bytes), or on a CPU with `stream` where they can be read so, the model's blocks stay in
        their files: everything but a comparison with controls and other tools works so. A folder to work in keeps what
        is done, and an interrupted run goes on from there. `checked` is what `preflight` returned for the same source
        and configuration, which is then not run again.
        """
        checked, place = checked or preflight(source, config, texts=texts), place or Workplace()
        tell = progress or (lambda step, done, total: None)
        tell("load", 0, 1)
        loaded = steps.load_checked(checked, source, config, stream=stream, memory_budget=place.memory_budget)
        tell("load", 1, 1)
        return cls(
            loaded, checked.texts, config, progress=progress, memory_budget=place.memory_budget, work=place.folder
        )

    def protecting(self, layers: Sequence[int] | Literal["auto", "none"]) -> Self:
        """Return a copy with another protection; it remembers the sweep, and no plan."""
        if not isinstance(layers, str):
            layers = check_layers(layers, self.loaded.layers) if layers else "none"
        other = copy(self)
        search = self.config if layers == "auto" else FairConfig()  # else there is none to bound
        other.config = replace(self.config, protect_layers=layers, time=search.time, sentences=search.sentences)
        other._search = None
        other._remember_plan(None)
        return other

    def following(self, plan: ProtectionPlan) -> Self:
        """Return a copy with a plan that was made before; it remembers the sweep. Raises as `quantize`."""
        other = copy(self)
        other._remember_plan(plan)
        return other

    @property
    def last_sweep(self) -> SweepReport | None:
        """The sweep that is remembered; None before the first one."""
        return self._report

    def _time(self) -> SearchTime | None:
        """Return the time for the search of a plan, what was done of it taken off; None where none was stated."""
        if self._search is None and self.config.time is not None:
            self._search = SearchTime(self.config.time, self._clock)
        return self._search

    def _remember_plan(self, plan: ProtectionPlan | None) -> None:
        if plan is not None:
            plan = steps.fitting_plan(plan, self.loaded, self.config)
        if plan is None or plan != self._plan:
            self._plan, self._quantized, self._exported = plan, None, None
