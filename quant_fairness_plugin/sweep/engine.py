"""Runs the states of a sweep: each block is quantized once, states are swapped in by reference and always undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor
from transformers import PreTrainedModel

from quant_fairness_plugin.artifacts import (
    Grid,
    LanguageDamage,
    Objective,
    StateScores,
    Status,
    SweepReport,
    SweepRow,
    TextSet,
)
from quant_fairness_plugin.errors import QualityGateError
from quant_fairness_plugin.measure.damage import measure_damage, objective_values, supported_languages
from quant_fairness_plugin.measure.intervals import MINIMUM_DRAWS
from quant_fairness_plugin.measure.scoring import ModelState, fixed_state, score_states
from quant_fairness_plugin.model.linear import linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.model.provenance import provenance
from quant_fairness_plugin.quantize.bank import quantize_bank, swapped
from quant_fairness_plugin.sweep.ranking import BASELINE, NONE, Mode, layer_plan, rank_layers
from quant_fairness_plugin.sweep.sizes import dense_bytes, quantized_bytes

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """A named set of protected layers; all others are quantized."""

    plan: str
    protected: tuple[int, ...]


def plan_trials(layers: int, modes: Sequence[Mode]) -> list[Trial]:
    """The plans of a sweep: all quantized, then per mode one plan a layer."""
    everything = tuple(range(layers))
    trials = [Trial(NONE, ())]
    if "protect-one" in modes:
        trials += [Trial(layer_plan("protect-one", i), (i,)) for i in everything]
    if "quantize-one" in modes:
        trials += [Trial(layer_plan("quantize-one", i), tuple(j for j in everything if j != i)) for i in everything]
    return trials


def sweep_layers(
    loaded: LoadedModel,
    texts: TextSet,
    *,
    grid: Grid | None = None,
    modes: Sequence[Mode] = ("protect-one",),
    reference: str | None = "en",
    top: int = 3,
    draws: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> SweepReport:
    """Damage of every plan, language by language, and the layers ranked by each objective.

    The model is left bit-identical. Languages that the 16-bit model does not support are named in the report and not
    swept: they have nothing to lose. Plans are evaluated with round-to-nearest weights: they rank layers, they do not
    predict the damage of a GPTQ checkpoint.

    Args:
        loaded: the 16-bit model.
        texts: the sentences to choose on (the `search` part).
        grid: integer grid of the quantized layers; INT4, groups of 128, symmetric by default.
        modes: `protect-one` (all other layers quantized) and/or `quantize-one` (all other layers 16 bit).
        reference: language of excess and disparity, or None.
        top: how many layers the stability figures are about.
        draws: bootstrap resamples of the sentences.
        seed: seed of the resamples.
        progress: called with (batches done, batches in all).

    Raises:
        ConfigError: the grid's group fits no weight of the model.
    """
    grid = grid or Grid()
    statuses = _support(loaded, texts)
    # An unsupported reference stays in, so that excess and disparity say why they are undefined.
    texts = texts.choose([name for name, status in statuses.items() if status == "supported" or name == reference])
    trials = plan_trials(loaded.layers, modes)
    scores = _score_trials(loaded, texts, trials, grid, progress)
    damage = {t.plan: _damage(scores, t.plan, texts, loaded, reference, draws, seed) for t in trials}
    layer_bytes, other_bytes = count_bytes(loaded, grid)
    arguments = {"grid": str(grid), "modes": list(modes), "reference": reference, "top": top, "draws": draws}
    return SweepReport(
        provenance=provenance(loaded.files, texts, seed=seed, arguments=arguments),
        layers=loaded.layers,
        grid=grid,
        reference=reference,
        languages=statuses,
        rows=tuple(_row(trial, damage, scores, reference, draws, seed) for trial in trials),
        rankings={
            f"{mode} {objective}": rank_layers(
                scores,
                damage,
                layers=loaded.layers,
                mode=mode,
                objective=objective,
                reference=reference,
                top=top,
                draws=draws,
                seed=seed,
            )
            for mode in modes
            for objective in get_args(Objective)
        },
        scores=scores,
        layer_bytes=layer_bytes,
        other_bytes=other_bytes,
    )


def _support(loaded: LoadedModel, texts: TextSet) -> dict[str, Status]:
    """Which languages the 16-bit model knows at all.

    Raises:
        QualityGateError: none of them.
    """
    baseline = score_states([fixed_state(BASELINE, loaded.model)], loaded.tokenizer, texts)[BASELINE]
    vocabulary = loaded.model.config.vocab_size
    rows = measure_damage(baseline, baseline, texts, reference=None, vocabulary=vocabulary, draws=MINIMUM_DRAWS)
    if not supported_languages(rows):
        raise QualityGateError(
            f"the 16-bit model supports none of {', '.join(texts.languages)} ({rows[0].reason}); sweep a trained model"
        )
    return {row.language: row.status for row in rows}


def count_bytes(loaded: LoadedModel, grid: Grid) -> tuple[dict[str, tuple[int, ...]], int]:
    """Bytes of each layer's linear weights, whole and by unit (see `sizes`), and the bytes of everything else."""
    wide = replace(grid, bits=8)
    costs: dict[str, Callable[[int, int], int]] = {
        "fp16": dense_bytes,
        "quantized": lambda rows, cols: quantized_bytes(rows, cols, grid),
        "int8": lambda rows, cols: quantized_bytes(rows, cols, wide),
    }
    units = {unit.name: unit.modules for unit in loaded.family.units}
    shapes = [_shapes(loaded, layer) for layer in range(loaded.layers)]
    sizes = {
        f"{kind}{unit and '.'}{unit}": tuple(sum(cost(*layer[name]) for name in names) for layer in shapes)
        for unit, names in ({"": loaded.family.modules()} | units).items()
        for kind, cost in costs.items()
    }
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return sizes, 2 * parameters - sum(sizes["fp16"])


def _shapes(loaded: LoadedModel, layer: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's linear modules, by their name within the block."""
    block = loaded.block(layer)
    weights = {name: linear_weight(block.get_submodule(name)) for name in loaded.family.modules()}
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


def _score_trials(
    loaded: LoadedModel, texts: TextSet, trials: Sequence[Trial], grid: Grid, progress: Progress | None
) -> dict[str, StateScores]:
    bank = quantize_bank(loaded, grid)

    def state(trial: Trial) -> ModelState:
        return ModelState(trial.plan, lambda: _applied(loaded, bank, trial))

    return score_states(
        [fixed_state(BASELINE, loaded.model), *map(state, trials)], loaded.tokenizer, texts, progress=progress
    )


def _applied(
    loaded: LoadedModel, bank: dict[int, dict[str, Tensor]], trial: Trial
) -> AbstractContextManager[PreTrainedModel]:
    weights = {
        name: weight
        for layer, modules in bank.items()
        if layer not in trial.protected
        for name, weight in modules.items()
    }
    return swapped(loaded, weights)


def _damage(
    scores: dict[str, StateScores],
    plan: str,
    texts: TextSet,
    loaded: LoadedModel,
    reference: str | None,
    draws: int,
    seed: int,
) -> tuple[LanguageDamage, ...]:
    return measure_damage(
        scores[BASELINE],
        scores[plan],
        texts,
        reference=reference,
        vocabulary=loaded.model.config.vocab_size,
        draws=draws,
        seed=seed,
    )


def _row(
    trial: Trial,
    damage: dict[str, tuple[LanguageDamage, ...]],
    scores: dict[str, StateScores],
    reference: str | None,
    draws: int,
    seed: int,
) -> SweepRow:
    objectives = objective_values(
        scores[BASELINE], scores[trial.plan], damage[trial.plan], reference=reference, draws=draws, seed=seed
    )
    return SweepRow(plan=trial.plan, protected=trial.protected, damage=damage[trial.plan], objectives=objectives)
