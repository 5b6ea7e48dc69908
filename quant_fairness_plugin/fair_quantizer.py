"""The whole line in one class, in the order of the eight steps. Read this first.

    model (1) and texts (2) → measure (3) → sweep (4) → recommend (5) → quantize (6) → export (7) → serve (8)

Each step is a package or module of that name, takes plain data and returns plain data, and can be used alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import Unpack

from quant_fairness_plugin.artifacts import (
    Evidence,
    ExportRecord,
    Measurement,
    Mode,
    Part,
    Precision,
    ProtectionPlan,
    SweepReport,
    TextSet,
)
from quant_fairness_plugin.artifacts.evidence import RunResult
from quant_fairness_plugin.checkpoint.readers import check_exportable
from quant_fairness_plugin.config import FairConfig, FairOptions, make_config
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.evidence import Rivals, Trials, gather_evidence
from quant_fairness_plugin.export.foreign import quantize_with
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.measure.measurement import Measured, measure_states
from quant_fairness_plugin.measure.objectives import find_objective
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state
from quant_fairness_plugin.model.exchange import swapped
from quant_fairness_plugin.model.layers import check_layers
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.model.streamed import open_streamed
from quant_fairness_plugin.plans.costs import NO_OVERRIDES, count_bytes, layers_budget, with_columns
from quant_fairness_plugin.plans.plan_set import BASELINE, NONE
from quant_fairness_plugin.preflight import ModelSource, check_units, preflight
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.calibration import build_calibration
from quant_fairness_plugin.quantize.minimax import quantize_calibrated
from quant_fairness_plugin.quantize.stream import QuantizedModel, quantize_model
from quant_fairness_plugin.recommend import Limit, explicit_plan, recommend_plan
from quant_fairness_plugin.serve.load import load_quantized
from quant_fairness_plugin.sweep.checkpoint_bank import bank_recipe
from quant_fairness_plugin.sweep.config import SweepChoices, answers
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.executors import Executor

EXPORTED = "exported"
Progress = Callable[[str, int, int], None]
"""Called with (step, done, in all)."""


class FairQuantizer:
    """A model, a text set and a configuration; every method is one step and remembers its result for the next.

    The model itself is never changed.

    Example:
        quantizer = FairQuantizer.from_pretrained("demo", protect_layers="auto")
        quantizer.save_pretrained("demo-int4-fair")
    """

    def __init__(
        self, loaded: LoadedModel, texts: TextSet, config: FairConfig, *, progress: Progress | None = None
    ) -> None:
        self.loaded, self.texts, self.config = loaded, texts, config
        self._progress = progress or (lambda step, done, total: None)
        self._memory_budget: int | None = None
        self._report: SweepReport | None = None
        self._bank: Path | None = None
        self._plan: ProtectionPlan | None = None
        self._quantized: QuantizedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        config: FairConfig | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        progress: Progress | None = None,
        **options: Unpack[FairOptions],
    ) -> FairQuantizer:
        """Steps 1 and 2: load a model and the texts, after checking everything that can be known before.

        Args:
            model: `demo`, `demo-gpt2`, a Hub id, a folder, or a `.safetensors` file.
            config: a complete configuration; or give single `options`, the fields of `FairConfig`.
            revision: commit of a Hub model.
            trust_remote_code: run code that the model's folder brings.
            allow_pickle: read pickle weights where there are no others.
            progress: called with (step, done, in all).
            **options: fields of `FairConfig`.

        Raises:
            QuantFairnessError: one of its kinds, before the weights are read wherever that is possible.
        """
        source = ModelSource(model, revision, trust_remote_code, allow_pickle)
        return cls.from_source(source, config or make_config(**options), progress=progress)

    @classmethod
    def from_source(
        cls,
        source: ModelSource,
        config: FairConfig,
        *,
        progress: Progress | None = None,
        memory_budget: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> FairQuantizer:
        """Steps 1 and 2 from a complete source and configuration; see `from_pretrained`.

        With a memory budget (bytes) the model's blocks stay in their files: it can be swept, and nothing else. In
        bfloat16 a sweep is faster where the processor computes in it, and ranks almost alike; measure in float32.
        """
        _, texts = preflight(source, config)
        open_model = load_model if memory_budget is None else open_streamed
        loaded = open_model(
            source.name,
            dtype=getattr(torch, dtype),
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            allow_pickle=source.allow_pickle,
        )
        found = cls(loaded, texts, config, progress=progress)
        found._memory_budget = memory_budget
        return found

    def protecting(self, layers: Sequence[int] | Literal["auto", "none"]) -> FairQuantizer:
        """The same model and texts with another protection; a sweep that was made already is kept."""
        chosen = layers if isinstance(layers, str) else (check_layers(layers, self.loaded.layers) if layers else "none")
        other = FairQuantizer(
            self.loaded, self.texts, replace(self.config, protect_layers=chosen), progress=self._progress
        )
        other._report, other._bank = self._report, self._bank
        return other

    def following(self, plan: ProtectionPlan) -> FairQuantizer:
        """The same model and texts with a plan that was made before, instead of choosing one.

        Raises:
            ConfigError: a plan for another number of layers, or for another grid than the configuration's.
        """
        if (plan.layers, plan.grid) != (self.loaded.layers, self.config.grid):
            raise ConfigError(
                f"the plan is for {plan.layers} layers of {plan.model} and {plan.grid}; here are {self.loaded.layers} "
                f"layers and {self.config.grid}. Name the plan's model and grid, or make another plan"
            )
        other = FairQuantizer(self.loaded, self.texts, self.config, progress=self._progress)
        other._plan = plan
        return other

    def measure(self, *states: ModelState, part: Part = "confirm") -> Measured:
        """Step 3: damage of model states against the 16-bit model, language by language.

        Without a state the 16-bit model is measured against itself: its baseline and which languages it supports.
        """
        self._check_whole("measured")
        baseline = fixed_state(BASELINE, self.loaded.model)
        states = states or (baseline,)
        return measure_states(
            baseline,
            states,
            self.loaded.tokenizer,
            self.texts.part(part),
            part=part,
            provenance=lambda given: provenance(self.loaded.files, self.texts, seed=self.config.seed, arguments=given),
            bootstrap=self.config.bootstrap,
            progress=partial(self._progress, f"measure {', '.join(state.name for state in states)}"),
        )

    def measure_folder(self, folder: Path, *, part: Part = "confirm") -> Measurement:
        """Step 3 on a written checkpoint, read back from its files (step 8) by our own dequantizer."""
        return self.measure(exported_state(folder), part=part).measurements[EXPORTED]

    def sweep(
        self,
        modes: Sequence[Mode] = ("protect-one",),
        *,
        bank: Path | None = None,
        work: Path | None = None,
        executor: Executor | None = None,
        **choices: Unpack[SweepChoices],
    ) -> SweepReport:
        """Step 4: damage of every plan on the search part, and the layers or units ranked by what they do alone.

        Args:
            modes: keep one in 16 bit, and/or quantize nothing but one.
            bank: a quantized checkpoint of this model, whose weights are the quantized side; None rounds to nearest.
            work: a folder of finished trials, from which an interrupted sweep goes on.
            executor: where the trials run; None is this process.
            **choices: fields of `SweepChoices`; `top` is the configuration's, or 3, where it is not given.
        """
        choices.setdefault("top", self.config.top or 3)
        if self._report is None or bank != self._bank or not answers(self._report, modes, choices):
            self._report, self._bank = None, bank
            self._report = sweep_units(
                self.loaded,
                self.texts.part("search"),
                grid=self.config.grid,
                bank_recipe=None if bank is None else bank_recipe(bank, self.config.grid),
                modes=modes,
                reference=self.config.reference,
                draws=self.config.draws,
                seed=self.config.seed,
                progress=partial(self._progress, "sweep"),
                work=work,
                executor=executor,
                memory_budget=self._memory_budget,
                **choices,
            )
        return self._report

    def recommend(self) -> ProtectionPlan:
        """Step 5: what keeps 16 bit, by the configuration's layers, or by `top` or the byte budget from a sweep.

        The last sweep is used, whatever it singled out; without one the layers are swept.
        """
        if self._plan is None:
            chosen, columns = self.config.protect_layers, self.config.protect_columns
            if chosen == "auto":
                share = layers_budget(self.loaded, self.config.grid, columns, self.config.max_overhead)
                plan = recommend_plan(
                    self._report or self.sweep(precisions=self.config.precisions),
                    Limit(max_overhead=share),
                    objective=self.config.objective,
                    top=self.config.top,
                    strict=self.config.strict,
                    overrides=self.config.overrides,
                )
            else:
                plan = self._explicit(() if chosen == "none" else chosen, self.config.overrides)
            self._plan = with_columns(plan, self.loaded, columns)
        return self._plan

    def evidence(self, plan: ProtectionPlan | None = None, *, work: Path | None = None) -> Evidence:
        """Step 5, checked: the plan against random and other plans of equal bytes, on the confirm part.

        Args:
            plan: what to judge; None is the recommended one.
            work: a folder of finished trials, from which an interrupted evaluation goes on.

        Raises:
            ConfigError: the plan protects nothing.
        """
        self._check_whole("compared with controls")
        return gather_evidence(
            self.loaded,
            plan or self.recommend(),
            self.texts.part("confirm"),
            rivals=Rivals(texts=self.texts.part("search")),
            objective=self.config.objective if find_objective(self.config.objective).judges_sets else "worst",
            bootstrap=self.config.bootstrap,
            progress=partial(self._progress, "verify"),
            trials=None if work is None else Trials(work=work),
        )

    def _explicit(self, layers: tuple[int, ...], overrides: Mapping[str, Precision] = NO_OVERRIDES) -> ProtectionPlan:
        layer_bytes, other_bytes = count_bytes(self.loaded, self.config.grid)
        return explicit_plan(
            layers,
            model=self.loaded.files.name,
            grid=self.config.grid,
            layer_bytes=layer_bytes,
            other_bytes=other_bytes,
            overrides=overrides,
        )

    def quantize(self, plan: ProtectionPlan | None = None) -> QuantizedModel:
        """Step 6: integers and scales of every layer that the plan does not protect, calibrated as configured."""
        if plan is not None:
            return self._quantize(plan)
        if self._quantized is None:
            self._quantized = self._quantize(self.recommend())
        return self._quantized

    def _quantize(self, plan: ProtectionPlan) -> QuantizedModel:
        self._check_whole("quantized")
        calibration = None
        if self.config.method != "rtn":
            calibration = build_calibration(
                self.loaded.tokenizer,
                self.texts.part("calibrate"),
                tokens_per_language=self.config.tokens_per_language,
                weighting=self.config.calibration,
            )
        if self.config.backend != NATIVE and calibration is not None:
            return quantize_with(
                self.config.backend, self.loaded, plan, method=self.config.method, calibration=calibration
            )
        quantize = partial(
            quantize_model,
            self.loaded,
            plan.protected_layers,
            method=self.config.method,
            grid=self.config.grid,
            overrides=plan.overrides,
            columns=plan.protect_columns,
            progress=partial(self._progress, "quantize"),
        )
        if calibration is None:
            return quantize()
        return quantize_calibrated(lambda given: quantize(calibration=given), calibration, self.texts)

    def save_pretrained(
        self,
        out: str | Path,
        *,
        overwrite: bool = False,
        measure: Callable[[Path], Measurement] | None | Literal["exported"] = "exported",
    ) -> ExportRecord:
        """Steps 7 and 8: write the checkpoint beside, verify it, measure what was written, then rename it.

        Args:
            out: the folder to make.
            overwrite: replace an earlier export of that name.
            measure: measures the written folder; None leaves the record without a measurement.

        Raises:
            ConfigError: `out` exists and `overwrite` is False.
            UnsupportedModelError: the reader could not load this; said before anything is quantized.
            ArtifactError: what was written is not what was quantized; nothing is left behind.
        """
        self._check_exportable(self.config.overrides)
        plan = self.recommend()
        self._check_exportable(plan.overrides)
        return export(
            self.quantize(),
            Path(out),
            plan=plan,
            texts=self.texts,
            format=self.config.format,
            reader=self.config.reader,
            seed=self.config.seed,
            overwrite=overwrite,
            measure=self.measure_folder if measure == "exported" else measure,
        )

    def _check_whole(self, what: str) -> None:
        if self._memory_budget is not None:
            raise ConfigError(
                f"{self.loaded.files.name} was opened with a memory budget, so its blocks are in their files: it can "
                f"be swept, and not {what}. Open it without one"
            )

    def _check_exportable(self, overrides: Mapping[str, Precision]) -> None:
        config = self.config
        if config.protect_layers == "auto" and "int8" in config.precisions and self._plan is None:
            # What a sweep may find must be exportable; it is checked before the sweep.
            overrides = {"layers.0": "int8", **overrides}
        check_units(config, units=tuple(unit.name for unit in self.loaded.family.units), layers=self.loaded.layers)
        check_exportable(
            self.loaded.family,
            format=config.format,
            grid=config.grid,
            reader=config.reader,
            overrides=overrides,
        )

    def run(self, out: str | Path, *, overwrite: bool = False) -> RunResult:
        """The main job: all eight steps, and the same quantization without protection for comparison.

        Raises:
            QuantFairnessError: one of its kinds; a failed run leaves nothing behind.
        """
        self._check_exportable(self.config.overrides)
        plan = self.recommend()
        self._check_exportable(plan.overrides)
        protects = plan.protected_layers or plan.overrides or plan.protect_columns
        bare = self.quantize(self._explicit(())) if protects else self.quantize()
        unprotected = ModelState(NONE, lambda: swapped(self.loaded, bare.dense_weights()))
        measured: list[Measured] = []

        def compare(folder: Path) -> Measurement:
            measured.append(self.measure(unprotected, exported_state(folder)))
            return measured[0].measurements[EXPORTED]

        record = self.save_pretrained(out, overwrite=overwrite, measure=compare)
        return RunResult(
            plan=record.plan,
            record=record,
            unprotected=measured[0].measurements[NONE],
            protected=measured[0].measurements[EXPORTED],
            gain=measured[0].gain(NONE, EXPORTED),
        )


def exported_state(folder: Path, *, name: str = EXPORTED) -> ModelState:
    """A written checkpoint as a model state, read back from its files by our own dequantizer."""
    return fixed_state(name, load_quantized(folder, kernel="reference"))
