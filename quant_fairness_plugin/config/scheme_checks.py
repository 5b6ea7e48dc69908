"""What a configuration refuses of a scheme whose codes are floats."""

from __future__ import annotations

from collections.abc import Iterator

from quant_fairness_plugin.config.quantizing import QuantizingFields
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.gguf import FORMAT
from quant_fairness_plugin.quantize.backends import NATIVE
from quant_fairness_plugin.quantize.methods import find_method, method_names
from quant_fairness_plugin.quantize.schemes import FLOAT_CLIPS, SCHEMES, FloatScheme

EIGHT = 8
Misfit = tuple[bool, str, str]
"""Whether an option does not fit, how it stands, and what is accepted."""


def check_scheme(fields: QuantizingFields, *, format: str, columns: float, int8_layers: tuple[int, ...]) -> None:
    """Refuse options that a scheme of floats leaves no choice of, or cannot be used with.

    Args:
        fields: how weights are rounded.
        format: of the checkpoint; those of folders are checked with the readers.
        columns: share of the input channels in 16 bit.
        int8_layers: layers in 8 bits.

    Raises:
        ConfigError: names the option and what is accepted.
    """
    scheme = SCHEMES.get(fields.scheme)
    if scheme is None:
        return
    others: tuple[Misfit, ...] = (
        (format == FORMAT, f"format {format!r}", "format compressed-tensors"),
        (columns > 0, f"protect_columns {columns:g}", "whole layers and units in 16 bit"),
        (
            bool(int8_layers) and scheme.bits >= EIGHT,
            f"int8_layers {','.join(map(str, int8_layers))}",
            "layers and units in 16 bit",
        ),
    )
    for wrong, given, accepted in (*_of_rounding(fields, scheme), *others):
        if wrong:
            raise ConfigError(
                f"{given} cannot be used with scheme {scheme.name!r}; accepted with it: {accepted}. "
                "Leave it out, or use scheme 'int'"
            )


def _of_rounding(fields: QuantizingFields, scheme: FloatScheme) -> Iterator[Misfit]:
    groups = "a scale for each output channel" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
    yield fields.quantize_rest_to is not None, f"quantize_rest_to {fields.quantize_rest_to!r}", "no width of integers"
    yield fields.bits != scheme.bits, f"bits {fields.bits}", f"bits {scheme.bits}"
    yield fields.group_size != "auto", f"group_size {fields.group_size}", f"{groups}, which nothing can change"
    yield fields.symmetric is False, "symmetric False (--asym)", "a grid without zero points"
    clips = " or ".join(FLOAT_CLIPS)
    yield fields.clip not in (None, *FLOAT_CLIPS), f"clip {fields.clip!r}", f"clip {clips}"
    method = find_method(fields.method)
    yield not method.floats, f"method {fields.method!r}", f"method {method_names(lambda one: one.floats)}"
    yield fields.backend != NATIVE, f"backend {fields.backend!r}", f"backend {NATIVE!r}"
