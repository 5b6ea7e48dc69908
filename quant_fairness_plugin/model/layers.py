"""Layer lists: text or numbers in, a sorted tuple of valid layer indices out. Imports nothing heavy."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence

from quant_fairness_plugin.errors import InvalidLayerError

_INDEX = re.compile(r"-?[0-9]{1,9}", re.ASCII)  # `int` alone also takes "1_0", "+3", "٣" and unbounded digits


def parse_layers(text: str, layers: int) -> tuple[int, ...]:
    """Return the layer indices that a comma-separated list names, ascending.

    Args:
        text: `"0,9,11"`; spaces around the commas are allowed.
        layers: how many layers the model has.

    Raises:
        InvalidLayerError: an empty list or entry, a word, an index that is negative, too large or given twice, or all
            layers at once.

    >>> parse_layers("11, 0,9", 12)
    (0, 9, 11)
    """
    entries = [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if not _INDEX.fullmatch(entry):
            raise InvalidLayerError(
                f"layer list {_shorten(text)!r}: {_shorten(entry)!r} is not a layer index; expected indices "
                f"0..{layers - 1} separated by commas. Write for example {_example(layers)!r}."
            )
    return check_layers([int(entry) for entry in entries], layers)


def check_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the given layer indices, ascending, after checking that they fit a model of `count` layers.

    Args:
        layers: layer indices in any order; a bool is not an index, numpy integers are.
        count: how many layers the model has.

    Raises:
        InvalidLayerError: no index, one that is no integer, negative, too large or given twice, or all layers at once.
    """
    indices = [_index(layer, count) for layer in layers]
    if not indices:
        raise InvalidLayerError(f"the layer list is empty; name at least one of 0..{count - 1}, or say 'none'.")
    outside = [i for i in indices if not 0 <= i < count]
    if outside:
        raise InvalidLayerError(
            f"layer {outside[0]} does not exist: the model has {count} layers, 0..{count - 1}. "
            "Layers are counted from 0; correct the list."
        )
    twice = sorted(i for i, times in Counter(indices).items() if times > 1)
    if twice:
        raise InvalidLayerError(f"layer {twice[0]} is listed more than once; each layer may be named once. Remove it.")
    if len(indices) == count:
        raise InvalidLayerError(
            f"the list names all {count} layers, so nothing would be quantized; at most {count - 1} may be protected. "
            "Leave one out."
        )
    return tuple(sorted(indices))


def _index(layer: object, count: int) -> int:
    try:
        if isinstance(layer, bool):
            raise TypeError("a bool is not an index")
        return operator.index(layer)  # type: ignore[arg-type] # the TypeError is the check
    except TypeError as err:
        raise InvalidLayerError(
            f"{_shorten(repr(layer))} is not a layer index; expected one of 0..{count - 1}. Correct the list."
        ) from err


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _example(layers: int) -> str:
    return "0" if layers < 3 else f"0,{layers - 1}"
