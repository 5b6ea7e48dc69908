"""What of an attention can be turned head by head: its values, and the module that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quant_fairness_plugin.model.architectures import FusionGroup, Turn
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.tracing.folds import EQUAL, MOVED
from quant_fairness_plugin.model.tracing.trial import Trial
from quant_fairness_plugin.model.turning import Turning

_CLIPS = "clip_qkv"
"""Key of configs whose values are cut off at a bound, which a trial's small ones do not reach."""


def find_turns(trial: Trial, layers: Sequence[int], units: Sequence[FusionGroup]) -> tuple[Turn, ...]:
    """Return the pairs of modules of blocks that are built alike of which it is proved that they can be turned."""
    if getattr(trial.model.config, _CLIPS, None):
        return ()
    found: list[Turn] = []
    for turn in _candidates(trial, layers[0], units):
        taken = {name for other in found for name in (other.values, other.output)}
        if not taken & {turn.values, turn.output} and _is_proved(trial, layers, turn):
            found.append(turn)
    return tuple(found)


def _candidates(trial: Trial, layer: int, units: Sequence[FusionGroup]) -> Iterator[Turn]:
    """Yield a module that is alone in its group, with one before it of the same parent that it could read in heads.

    The widest heads first: what turns in narrower ones turns in parts of them.
    """
    for unit in units:
        output = unit.modules[0]
        for event in trial.events[layer] if len(unit.modules) == 1 else ():
            if event.name == output:
                break
            rows = trial.rows(layer, event.name) if event.linear else 0
            if rows and event.parent == output.rpartition(".")[0] and trial.columns(layer, output) % rows == 0:
                yield from (Turn(event.name, output, heads) for heads in trial.value_heads if rows % heads == 0)


def _is_proved(trial: Trial, layers: Sequence[int], turn: Turn) -> bool:
    """Whether the logits stay when both modules are turned in all of the layers, and move when only one is.

    All of them, because a layer may hand its values on to later ones.
    """
    turning = Turning(turn.values, turn.output, trial.rows(layers[0], turn.values) // turn.heads)
    if turning.width == 1:
        return False
    with trial.changed(layers):
        for layer in layers:
            turning.apply({name: trial.blocks[layer].get_submodule(name) for name in (turn.values, turn.output)})
        if trial.distance() >= EQUAL:
            return False
        for layer in layers:
            output = trial.blocks[layer].get_submodule(turn.output)
            set_linear_weight(output, turning.undone(turn.output, linear_weight(output)))
        return trial.distance() >= MOVED
