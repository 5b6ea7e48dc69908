"""One model from measurement to a verified checkpoint, in the order of the steps. Read this first.

    model and texts → measure → sweep → recommend → quantize → export → serve

Each step is a package of that name, takes plain data and returns plain data, and can be used alone. Here a step takes
the result of the one before as an optional argument; without it, it uses the result that the quantizer remembers, or
makes it first. How a model is opened, and what is remembered of it, is in `opened`; how a configuration becomes the
arguments of a step, in `steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from typing_extensions import Unpack

from quant_fairness_plugin import planning, steps
from quant_fairness_plugin.artifacts import (
    BeforeAndAfter,
    ExportRecord,
    Measurement,
    Mode,
    Part,
    ProtectionPlan,
    SweepReport,
    UnitScores,
)
from quant_fairness_plugin.artifacts.evidence import Evidence, RunResult
from quant_fairness_plugin.checkpoint.formats import check_folder_format
from quant_fairness_plugin.checkpoint.others import readable_folder
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.export.companions import companions_of
from quant_fairness_plugin.export.gguf import GgufReport, check_gguf, check_like, write_gguf
from quant_fairness_plugin.export.push import PushOptions, push_folder
from quant_fairness_plugin.export.writer import Measure
from quant_fairness_plugin.measure.measurement import Measured
from quant_fairness_plugin.measure.scoring import ModelState
from quant_fairness_plugin.opened import Opened
from quant_fairness_plugin.plans.plan_set import NONE
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.steps import EXPORTED, exported_state
from quant_fairness_plugin.sweep.bank import Bank
from quant_fairness_plugin.sweep.config import SweepConfig, SweepOptions
from quant_fairness_plugin.sweep.execution import Execution
from quant_fairness_plugin.sweep.executors import Executor

Reporter = Callable[[Path, Measurement, Measurement], None]
"""Called with a checkpoint folder, the damage without protection, and the checkpoint's."""


class FairQuantizer(Opened):
    """A model, a text set and a configuration; every method is one step and remembers its result for the next.

    A new sweep forgets the plan; a new plan forgets the quantized model and the export. The model is never changed.

    Example:
        FairQuantizer.from_pretrained("demo", protect_layers="auto").save_pretrained("demo-int4-fair")
    """

    def measure(self, *states: ModelState, part: Part = "confirm") -> Measured:
        """Measure the damage of model states against the 16-bit model, language by language.

        Without a state the 16-bit model is measured against itself: its baseline and which languages it supports.
        """
        progress = partial(self._progress, steps.name_measuring(states))
        kept = None if self._place.folder is None else self._place.folder / "measured"
        return steps.measure(self.loaded, self.texts, self.config, states, part=part, kept=kept, progress=progress)

    def measure_folder(self, folder: Path | None = None, *, part: Part = "confirm") -> Measurement:
        """Measure a written checkpoint (None: the last export), read back from its files by our own dequantizer.

        A GGUF file is dequantized by Transformers, once, into a cache.

        Raises:
            ConfigError: a checkpoint that was made from another model.
        """
        path = folder or self._last_export()
        folder = readable_folder(path)
        made_here = path.is_file() and path == self._exported
        compared = made_here or steps.check_folder(folder, self.loaded)
        state = exported_state(folder, self.loaded)
        measured = self.measure(state, part=part).measurements[EXPORTED]
        return self._asked(folder, state, measured, part, compared=compared, made_here=made_here)

    def _asked(
        self,
        folder: Path,
        state: ModelState,
        measured: Measurement,
        part: Part,
        *,
        compared: bool,
        made_here: bool = False,
    ) -> Measurement:
        """Return a folder's measurement with what its record says, and with its answers to a few prompts."""
        answers = steps.ask(self.loaded, folder, state, measured, self.config, progress=self._progress)
        measured = replace(measured, answers=answers)
        return steps.measured_folder(measured, folder, self.texts, part, compared=compared, made_here=made_here)

    def sweep(
        self,
        modes: Sequence[Mode] = ("protect-one",),
        *,
        bank: Path | None = None,
        work: Path | None = None,
        executor: Executor | None = None,
        **options: Unpack[SweepOptions],
    ) -> SweepReport:
        """Measure every plan on the search part and rank the units; the last sweep is returned if it holds all plans.

        Args:
            modes: keep one in 16 bit, and/or quantize nothing but one.
            bank: a quantized checkpoint of this model, whose weights are the quantized side; None rounds to nearest.
            work: a folder of finished trials, from which an interrupted sweep goes on.
            executor: where the trials run; None is this process.
            **options: fields of `SweepConfig`; `top` is the configuration's, or 3, where it is not given.
        """
        options.setdefault("top", self.config.top or 3)
        config = SweepConfig.make(modes, **options)
        if self._report is None or bank != self._bank or not SweepConfig.of(self._report).covers(config):
            run = Execution(work=work, executor=executor, memory_budget=self._place.memory_budget)
            progress = partial(self._progress, "sweep")
            self._report = steps.sweep(
                self.loaded, self.texts, self.config, config, bank=bank, execution=run, progress=progress
            )
            self._bank = bank
            self._remember_plan(None)
        return self._report

    def score(self) -> UnitScores:
        """Score every unit at every precision that it can get, language by language, by one pass of gradients.

        Scored are the errors of the method itself, where it has any of its own; see `planning.quantizes_first`.
        """
        if self._scores is None:
            planning.check_scorable(self.loaded)
            progress, search = partial(self._progress, "score"), self._time()
            with nullcontext() if search is None else search.counted():
                if search is not None:
                    steps.check_time(self.loaded, self.texts, self.config, search, quantizes=self._quantizes_to_score())
                if planning.quantizes_first(self.config) and self._bare is None:
                    planning.check_supported(self.loaded, self.texts, self.config)
                self._scores = planning.score(
                    self.loaded, self.texts, self.config, self._scoring_bank(), search=search, progress=progress
                )
        return self._scores

    def _quantizes_to_score(self) -> bool:
        """Return whether scores take a quantization that is still to be made; a folder to work in may hold it."""
        if not planning.quantizes_first(self.config) or self._place.folder is not None:
            return False
        return self._bare is None or not planning.made_as(self._bare, self.config)

    def recommend(self, report: SweepReport | UnitScores | None = None) -> ProtectionPlan:
        """Return what gets which precision: the configuration's layers, or what scores or a sweep recommend.

        Args:
            report: scores, or a sweep; None is the last sweep, whatever it singled out. Without one the units are
                scored, or swept where the configuration asks for it.

        Raises:
            ConfigError: a report of another model or grid, or beside layers that the configuration names.
            QualityGateError: no plan keeps the configuration's target or limits.
        """
        if report is not None:
            steps.check_report(report, self.loaded, self.config)
        if report is not None or self._plan is None:
            if self.config.protect_layers == "auto":
                report = report or self._report or self._measure_units()
            self._remember_plan(self._plan_by(report))
        assert self._plan is not None
        return self._plan

    def _measure_units(self) -> SweepReport | UnitScores:
        planning.check_budget(self.loaded, self.config)
        if self.config.scores_units:
            return self.score()
        if self.config.exhaustive:
            return self.sweep(granularity="unit", precisions=self.config.menu)
        return self.sweep(precisions=self.config.precisions or ("fp16",))

    def _plan_by(self, report: SweepReport | UnitScores | None) -> ProtectionPlan:
        if not isinstance(report, UnitScores):
            return steps.recommend(self.loaded, self.config, report)
        # Scores from a file are planned by as they are: to evaluate plans, the weights would have to be made again.
        bank = self._scoring_bank() if report is self._scores else None
        watched = planning.Watched(
            progress=partial(self._progress, "compare"),
            best=lambda words: self._progress(f"best plan so far: {words}", 1, 1),
        )
        search = self._time() if bank is not None else None
        with nullcontext() if search is None else search.counted():
            return planning.plan_by_scores(
                self.loaded, self.texts, self.config, report, bank, search=search, watched=watched
            )

    def _scoring_bank(self) -> Bank:
        bare = self._unprotected() if planning.quantizes_first(self.config) else None
        return planning.scoring_bank(self.loaded, self.config, bare)

    def _unprotected(self) -> QuantizedModel:
        """Return the model quantized without protection, made once."""
        if self._bare is None or not planning.made_as(self._bare, self.config):
            self._bare = self._quantize(steps.plan_of_layers(self.loaded, self.config, ()))
        return self._bare

    def evidence(self, plan: ProtectionPlan | None = None, *, work: Path | None = None) -> Evidence:
        """Compare a plan (None: the recommended one) with random and other plans of equal bytes, on the confirm part.

        An interrupted evaluation goes on from the finished trials in `work`. A plan that protects nothing is refused.
        """
        steps.check_whole(self.loaded, "compared with controls")
        plan, progress = plan or self.recommend(), partial(self._progress, "verify")
        return steps.evidence(self.loaded, plan, self.texts, self.config, work=work, progress=progress)

    def quantize(self, plan: ProtectionPlan | None = None) -> QuantizedModel:
        """Return integers and scales of every layer that the plan (None: the recommended one) does not protect.

        A plan for another number of layers, or for another grid than the configuration's, is refused (ConfigError).
        """
        if plan is not None:
            self._remember_plan(plan)
        if self._quantized is None:
            self._quantized = self._quantize(self.recommend())
        return self._quantized

    def save_pretrained(
        self,
        out: str | Path,
        quantized: QuantizedModel | None = None,
        *,
        overwrite: bool = False,
        measure: Callable[[Path], Measurement] | None | Literal["exported"] = "exported",
    ) -> ExportRecord:
        """Write the checkpoint beside its final name, verify it, measure what was written, then rename it.

        Args:
            out: the folder to make.
            quantized: what to write; None is the last quantized model, made from the plan where there is none.
            overwrite: replace an earlier export of that name.
            measure: measures the written folder; None leaves the record without a measurement.

        Raises:
            ConfigError: `out` exists and `overwrite` is False, or another model was quantized.
            UnsupportedModelError: the reader could not load this; said before anything is quantized.
            ArtifactError: what was written is not what was quantized; nothing is left behind.
        """
        if quantized is not None and quantized is not self._quantized:
            self._remember_plan(steps.plan_of_quantized(quantized, self.loaded))
            self._quantized = quantized
        measured = self.measure_folder if measure == "exported" else measure
        self._exportable_plan()
        return self._export(Path(out), overwrite=overwrite, measure=measured)

    def save_gguf(self, out: str | Path, *, like: str | Path | None = None, overwrite: bool = False) -> GgufReport:
        """Write the quantized model as one file for llama.cpp, and read it again; needs `format="gguf"`.

        Args:
            out: the file to make.
            like: a GGUF file of the same 16-bit model, of any type; None is the configuration's.
            overwrite: replace a GGUF file that is there.

        Raises:
            ConfigError: another format, no such file, or `out` exists; said before anything is quantized, like the
                next two.
            UnsupportedModelError: a grid or a model that GGUF has no place for.
            ArtifactError: a file of another model, or what was written is not what was quantized.
        """
        template = self.config.gguf_template(like)
        check_like(self.loaded, check_gguf(template, Path(out), overwrite=overwrite), self.config.embedding)
        if self._plan is None:
            steps.check_exportable_before_sweep(self.loaded, self.config)
        quantized = self.quantize()
        report = write_gguf(quantized, template, Path(out), embedding=self.config.embedding, overwrite=overwrite)
        self._exported = Path(out)
        return report

    def push_to_hub(self, repo_id: str, folder: Path | None = None, **options: Unpack[PushOptions]) -> str:
        """Verify an exported folder (None: the last export), upload it, return the commit's URL; see `push_folder`."""
        return push_folder(folder or self._last_export(), repo_id, **options)

    def run(self, out: str | Path, *, overwrite: bool = False, report: Reporter | None = None) -> RunResult:
        """Take all steps, and quantize once more without protection to compare; a failed run leaves nothing behind.

        Args:
            out: the folder to make.
            overwrite: replace an earlier export of that name.
            report: called with the folder before it gets its name, the damage without protection and that of the
                folder; a file that it writes there becomes a part of the checkpoint's record.
        """
        plan = self._exportable_plan()
        protects = plan.protected_layers or plan.overrides or plan.protect_columns
        bare = self._unprotected() if protects else self.quantize()
        both: list[Measured] = []

        def measure(folder: Path) -> BeforeAndAfter:
            state = exported_state(folder, self.loaded)
            both.append(self.measure(steps.unprotected_state(bare), state))
            protected = self._asked(folder, state, both[0].measurements[EXPORTED], "confirm", compared=True)
            if report is not None:
                report(folder, both[0].measurements[NONE], protected)
            return BeforeAndAfter(unprotected=both[0].measurements[NONE], protected=protected)

        record = self._export(Path(out), overwrite=overwrite, measure=measure)
        return steps.compare(record, both[0])

    def _quantize(self, plan: ProtectionPlan) -> QuantizedModel:
        progress = partial(self._progress, "quantize")
        return steps.quantize(self.loaded, plan, self.texts, self.config, workplace=self._place, progress=progress)

    def _exportable_plan(self) -> ProtectionPlan:
        """Return the plan, checked against format and reader: what is known before a sweep, then what it adds."""
        check_folder_format(self.config.format)
        checked = None if self._plan else steps.check_exportable_before_sweep(self.loaded, self.config)
        if not self._tried:
            steps.try_export(self.loaded, self.texts, self.config)
            companions_of(self.loaded).say_what_is_left_out(self.loaded.files.folder)
            self._tried = True
        plan = self.recommend()
        if plan.overrides != checked:
            steps.check_exportable_plan(self.loaded, self.config, plan.overrides, protected=plan.protected_layers)
        return plan

    def _export(self, out: Path, *, overwrite: bool, measure: Measure | None) -> ExportRecord:
        quantized, written = self.quantize(), partial(self._progress, "write and verify")
        written(0, 1)

        def then_measure(folder: Path) -> Measurement | BeforeAndAfter:
            written(1, 1)
            assert measure is not None
            return measure(folder)

        meanwhile = None if measure is None else then_measure
        record = steps.write(quantized, out, self.texts, self.config, overwrite=overwrite, measure=meanwhile)
        written(1, 1)
        self._exported = out
        return record

    def _last_export(self) -> Path:
        if self._exported is None:
            raise ConfigError("no export by this plan yet; call save_pretrained(out) first, or name a folder")
        return self._exported
