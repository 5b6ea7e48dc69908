"""Fusion groups and folds of an architecture without a record, seen in forward passes of a small random model.

A fusion group is what servers merge: linear modules of one parent that read the same tensor. A fold is a scale that the
inputs of a group can be multiplied by and the module in front divided by. Which module that is, is tried out in
float64: where the logits stay equal, the fold is *proved*; where they do not, it is none. No class name is read, and no
table of families. Names are only used to call things as the project and servers call them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from quant_fairness_plugin.errors import UnsupportedModelError
from quant_fairness_plugin.model.architectures import Block, BlockKind
from quant_fairness_plugin.model.small import narrow_models
from quant_fairness_plugin.model.structure import block_structure
from quant_fairness_plugin.model.tracing.folds import find_fold
from quant_fairness_plugin.model.tracing.groups import named_groups
from quant_fairness_plugin.model.tracing.steering import head_counts, without_steering
from quant_fairness_plugin.model.tracing.trial import Trial, blocks_of

NEVER_RUN = "no forward pass runs it"

_traced: dict[str, tuple[BlockKind, ...] | str] = {}
"""By class and config: what was found, or why nothing was. A model is looked at in every step of a run."""


def trace_blocks(model: PreTrainedModel, path: str) -> tuple[BlockKind, ...]:
    """Return what each block of a model is made of, one entry a layer.

    Args:
        model: a causal model, or the text decoder of another one, on any device, the meta device included; only its
            modules' names and shapes are looked at.
        path: full name of its list of blocks.

    Raises:
        UnsupportedModelError: no small model of its class can be built or run, or its blocks share modules.
    """
    key = f"{type(model).__module__}.{type(model).__qualname__} {path} {_config_text(model)}"
    if key not in _traced:
        try:
            _traced[key] = _trace(model, path)
        except UnsupportedModelError as err:
            _traced[key] = str(err)
    result = _traced[key]
    if isinstance(result, str):
        raise UnsupportedModelError(result)
    return result


def _config_text(model: PreTrainedModel) -> str:
    passing = {"_name_or_path", "dtype", "torch_dtype", "use_cache", "quantization_config", "transformers_version"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in passing}
    return json.dumps(config, sort_keys=True, default=str)


def _trace(model: PreTrainedModel, path: str) -> tuple[BlockKind, ...]:
    blocks = blocks_of(model, path)
    structures = [block_structure(block) for block in blocks]
    first = {structure: layer for layer, structure in reversed(list(enumerate(structures)))}

    def accepts(outline: PreTrainedModel) -> bool:
        return {block_structure(block) for block in blocks_of(outline, path)} >= first.keys()

    reason = "no small model of its class can be built"
    for small in narrow_models(model, max(2, 1 + max(first.values())), accepts):
        try:
            kinds = _kinds(Trial(small, path), first.keys())
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here; another size may do
            reason = f"a small model of its class fails ({type(err).__name__}: {' '.join(str(err).split())[:120]})"
            continue
        heads = head_counts(model)
        return tuple(without_steering(*kinds[structures[i]], block, heads) for i, block in enumerate(blocks))
    raise UnsupportedModelError(f"its blocks cannot be traced: {reason}")


def _kinds(trial: Trial, wanted: Iterable[Block]) -> dict[Block, tuple[BlockKind, frozenset[str]]]:
    structures = [block_structure(block) for block in trial.blocks]
    return {
        structure: _kind(trial, [layer for layer, other in enumerate(structures) if other == structure])
        for structure in wanted
    }


def _kind(trial: Trial, layers: Sequence[int]) -> tuple[BlockKind, frozenset[str]]:
    """Return what blocks of the small model that are built alike are made of, and their modules that may steer.

    These are all but those that read what the last linear module of their parent reads.
    """
    layer = layers[0]
    events = trial.events[layer]
    reads = [event for event in events if event.linear]
    called = {event.name for event in reads}
    units = tuple(named_groups(trial, layer, reads))
    kept = [(name, NEVER_RUN) for name in block_structure(trial.blocks[layer]).linears if name not in called]
    folds = tuple(fold for unit in units if (fold := find_fold(trial, layers, unit)) is not None)
    last = {event.parent: event.read for event in reads}
    before = frozenset(event.name for event in reads if event.read != last[event.parent])
    return BlockKind(units, folds, tuple(kept)), before
