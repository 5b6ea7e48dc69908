"""What a plan gives a precision to: a whole layer, or a fusion group in it. The one place that spells and reads names.

On disk and in reports a unit is `layers.3` or `layers.3.down`; people write `3` and `3.down`. What stands around the
layers (`embeddings`, `final_norm`, `head`, …) has a name of its own and is no `Unit`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant_fairness_plugin.errors import ConfigError

# A group of an architecture that is not listed is a module of its own, whose name can have dots: `self_attn.q_proj`.
_NAME = re.compile(r"(?:layers\.)?(0|[1-9][0-9]{0,8})(?:\.([A-Za-z_]\w*(?:\.\w+)*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Unit:
    """A decoder block, or one of its fusion groups."""

    layer: int
    """Counted from 0."""
    group: str | None = None
    """The fusion group, such as `qkv` or `down`, or a module (`self_attn.q_proj`) where no groups are known; None for
    the whole layer."""

    @classmethod
    def parse(cls, name: str) -> Unit:
        """Read `layers.3.down`, `layers.3`, `3.down` or `3`.

        Raises:
            ConfigError: another spelling.

        >>> Unit.parse("3.down")
        Unit(layer=3, group='down')
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"{name!r} names no layer and no fusion group of one; write LAYER or LAYER.GROUP, such as 3 or 3.down"
            )
        return cls(int(match[1]), match[2])

    @classmethod
    def is_name(cls, name: str) -> bool:
        """Return whether a name in a plan is that of a unit, rather than of what stands around the layers."""
        return name.startswith("layers.") and _NAME.fullmatch(name) is not None

    @classmethod
    def is_layer(cls, name: str) -> bool:
        """Return whether a name in a plan is that of a whole layer."""
        return cls.is_name(name) and cls.parse(name).group is None

    @classmethod
    def is_group(cls, name: str) -> bool:
        """Return whether a name in a plan is that of a fusion group."""
        return cls.is_name(name) and cls.parse(name).group is not None

    @property
    def short(self) -> str:
        """As people write it: `3`, `3.down`."""
        return str(self.layer) if self.group is None else f"{self.layer}.{self.group}"

    @property
    def whole(self) -> Unit:
        """The layer that the unit is, or is a part of."""
        return Unit(self.layer)

    def part(self, group: str) -> Unit:
        """Return a fusion group of the same layer."""
        return Unit(self.layer, group)

    def __str__(self) -> str:
        return f"layers.{self.short}"
