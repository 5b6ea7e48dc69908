"""Solve one block after another, each fusion group on the inputs that it will get in the quantized model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import Unit
from quant_fairness_plugin.errors import UnsolvableError
from quant_fairness_plugin.model.block_feed import block_feed
from quant_fairness_plugin.model.experts import Experts
from quant_fairness_plugin.model.freed import return_free_pages
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.streamed import StreamedModel
from quant_fairness_plugin.quantize.blocks import Rows, Running
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.experts import expert_stages, routed_rows
from quant_fairness_plugin.quantize.methods.method import Method
from quant_fairness_plugin.quantize.moments import FairMagnitude, MomentWatch, Original, fair_moments, language_moments
from quant_fairness_plugin.quantize.results import Results
from quant_fairness_plugin.quantize.selection import Selection
from quant_fairness_plugin.quantize.solving import Inputs, Problem, Solved, error_prefix

_logger = logging.getLogger(__name__)
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What stays the same from the first block to the last."""

    loaded: LoadedModel
    method: Method
    selection: Selection
    columns: float
    report: Report
    results: Results
    strict: bool
    """Stop at a module that cannot be solved, instead of keeping its fusion group in 16 bit."""

    def units(self, layer: int) -> Iterator[tuple[Unit, dict[str, nn.Module]]]:
        """Yield the fusion groups to quantize in a layer, in forward order, with their modules by full name."""
        modules = self.loaded.linears(layer)
        family = self.loaded.family
        names = {f"{family.blocks}.{layer}.{unit.modules[0]}": unit.name for unit in family.units_of(layer)}
        for group in self.selection.units.get(layer, ()):
            yield Unit(layer, names[group[0]]), {name: modules[name] for name in group}

    def routed(self, unit: Unit) -> bool:
        """Return whether a unit is that of a layer's routed experts."""
        return any(group.routed and group.name == unit.group for group in self.loaded.family.units_of(unit.layer))

    def solve(self, unit: Unit, weights: Mapping[str, Tensor], measured: Inputs | None, solved: Solved) -> None:
        """Hand a fusion group to the method."""
        problem = Problem(
            loaded=self.loaded, unit=unit, weights=weights, grids=self.selection.grids, columns=self.columns,
            measured=measured,
        )  # fmt: skip
        self.method.solve(problem, solved)

    def keep(self, names: Iterable[str], err: UnsolvableError, solved: Solved) -> None:
        """Leave the modules of a fusion group in 16 bit, as servers merge them into one matrix; or stop."""
        if self.strict:
            raise err
        reason = str(err).partition(";")[0]
        _logger.warning("%s. It keeps 16 bit", reason)
        solved.kept |= dict.fromkeys(names, reason)


@torch.no_grad()
def solve_from_weights(work: Work) -> None:
    """Solve by a method without calibration, for which the model is not run."""
    missing = [layer for layer in work.selection.units if not work.results.has(layer)]
    with block_feed(work.loaded, missing, prefetch=True) as resident:
        for layer in range(work.loaded.layers):
            if layer in missing:
                with resident(layer):
                    solved = Solved()
                    for unit, modules in work.units(layer):
                        weights = {name: linear_weight(module) for name, module in modules.items()}
                        work.solve(unit, weights, None, solved)
                    work.results.add(layer, solved)
            work.report(layer + 1, work.loaded.layers)


@dataclass(frozen=True, slots=True)
class Given:
    """What the block at hand is given."""

    batches: Sequence[Running]
    original: Original | None
    calibration: CalibrationSet


@dataclass(frozen=True, slots=True)
class Streams:
    """The calibration rows on their way."""

    quantized: Rows
    """Through what is quantized so far."""
    original: Rows | None
    """Through the 16-bit model, where the method compares; at the same block, or one further after an interruption."""

    @property
    def layer(self) -> int | None:
        """The block that the rows furthest behind reach next; None where one has not entered the model."""
        stages = [rows.layer for rows in self._all]
        return None if None in stages else min(stage for stage in stages if stage is not None)

    def enter(self, *, again: bool) -> None:
        """Bring the rows to the first block; with `again`, also those that an earlier run had brought further."""
        for rows in self._all:
            rows.enter(again=again)

    def untouched(self, block: nn.Module) -> nn.Module | None:
        """Return a copy of a block that is not quantized yet, where the original rows need one."""
        return None if self.original is None else deepcopy(block)

    def advance(self, layer: int, block: nn.Module, untouched: nn.Module | None) -> None:
        """Run a quantized block, and the copy of what it was, on the rows that are not behind it yet."""
        self.quantized.advance(layer, block)
        if self.original is not None and untouched is not None:
            self.original.advance(layer, untouched)

    def given(self, untouched: nn.Module | None, calibration: CalibrationSet) -> Given:
        """Return the rows as they stand before the block that they reach next."""
        original = None
        if self.original is not None and untouched is not None:
            original = Original(untouched, self.original.batches())
        return Given(self.quantized.batches(), original, calibration)

    def forget(self) -> None:
        """Remove what was kept to resume from."""
        for rows in self._all:
            rows.forget()

    @property
    def _all(self) -> tuple[Rows, ...]:
        return (self.quantized,) if self.original is None else (self.quantized, self.original)


def solve_on_inputs(work: Work, rows: Streams, calibration: CalibrationSet) -> None:
    """Solve by a method with calibration, block after block as the rows reach it."""
    loaded = work.loaded
    to_solve = [layer for layer, units in work.selection.units.items() if units]
    missing = [layer for layer in to_solve if not work.results.has(layer)]
    done = 0
    if missing:
        with _evaluating(loaded.model):
            reached = rows.layer
            again = reached is None or reached > missing[0]
            rows.enter(again=again)
            layers = range(0 if again or reached is None else reached, to_solve[-1] + 1)
            with block_feed(loaded, layers, prefetch=True) as resident:
                for layer in layers:
                    with resident(layer), _restored(loaded, layer):
                        untouched = rows.untouched(loaded.block(layer))
                        if work.results.has(layer):
                            _put_back(work, layer)
                        else:
                            _solve_layer(work, layer, rows.given(untouched, calibration))
                        if layer < layers[-1]:  # what follows the last quantized layer needs no inputs
                            rows.advance(layer, loaded.block(layer), untouched)
                    done = layer + 1
                    work.report(done, loaded.layers)
    rows.forget()
    if done < loaded.layers:
        work.report(loaded.layers, loaded.layers)


def _solve_layer(work: Work, layer: int, given: Given) -> None:
    """Solve a block and leave it as it is quantized."""
    solved = Solved()
    for unit, modules in work.units(layer):
        solve = _solve_experts if work.routed(unit) else _solve_unit
        solve(work, unit, modules, given, solved)
        return_free_pages()
    work.results.add(layer, solved)


@torch.no_grad()
def _put_back(work: Work, layer: int) -> None:
    """Leave a block as it was quantized by the run that this one goes on from."""
    solved, modules = work.results.layer(layer), work.loaded.linears(layer)
    for name in solved.tensors:
        set_linear_weight(modules[name], solved.dense(name))
    for name, value in solved.folded.items():
        work.loaded.model.get_parameter(name).copy_(value)


@torch.no_grad()
def _solve_unit(work: Work, unit: Unit, modules: Mapping[str, nn.Module], given: Given, solved: Solved) -> None:
    """Solve the modules of one fusion group and leave their dequantized weights in the block."""
    weights = {name: linear_weight(module) for name, module in modules.items()}
    first, module = next(iter(modules.items()))
    block, calibration = work.loaded.block(unit.layer), given.calibration
    magnitude, groups = FairMagnitude(calibration.shares), MomentWatch(weights, work.selection.grids)
    with error_prefix(first):
        moments = language_moments(block, module, unit.layer, given.batches, calibration, given.original)
        fair = fair_moments(groups.watch(magnitude.watch(moments)), weights, calibration.shares)
    inputs = Inputs(
        hessians=fair.hessians, magnitude=magnitude.value, groups=groups, tokens=calibration.telling_tokens,
        across=fair.across,
    )  # fmt: skip
    try:
        work.solve(unit, weights, inputs, solved)
    except UnsolvableError as err:
        return work.keep(modules, err, solved)
    for name in modules:
        set_linear_weight(modules[name], solved.dense(name))


@torch.no_grad()
def _solve_experts(work: Work, unit: Unit, modules: Mapping[str, nn.Module], given: Given, solved: Solved) -> None:
    """Solve the routed experts of a layer one by one and leave their dequantized weights in the block."""
    prefix = next(iter(modules)).rsplit(".", 2)[0]
    experts = work.loaded.model.get_submodule(prefix)
    assert isinstance(experts, Experts), "a routed unit is that of unfolded experts"
    with error_prefix(prefix):
        rows = routed_rows(work.loaded.block(unit.layer), experts, unit.layer, given.batches, given.calibration)
        if not torch.isfinite(rows.hidden).all():
            # All of them: readers take the experts of a layer for quantized, or none. So what one of them alone gives
            # itself (in front of `down`) is an error further down.
            error = UnsolvableError(f"{prefix}: the inputs of the experts held NaN or infinity on the calibration text")
            return work.keep(modules, error, solved)
    for stage in expert_stages(experts, prefix, rows):
        weights = {name: linear_weight(modules[name]) for name in stage.names}
        inputs = Inputs(
            hessians=dict.fromkeys(weights, stage.hessian),
            magnitude=torch.zeros(0),  # for AWQ alone, which is refused for experts
            groups=MomentWatch(weights, work.selection.grids),
            tokens=None,
        )
        work.solve(unit, weights, inputs, solved)
        for name in stage.names:
            set_linear_weight(modules[name], solved.dense(name))


@contextmanager
def _restored(loaded: LoadedModel, layer: int) -> Iterator[None]:
    if isinstance(loaded, StreamedModel):  # the block is read again from its file
        yield
        return
    parameters = list(loaded.block(layer).parameters())
    originals = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.detach().copy_(original)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode for a while; every submodule gets back the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
