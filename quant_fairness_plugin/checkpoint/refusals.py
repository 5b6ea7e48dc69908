"""What somebody wants written, and the rows that say when that is refused. Asked at plan time; no torch.

Formats and readers hold their rows as data: when a combination is refused, why, and the ways out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import FINE_GROUPS, FINEST_GROUP, Grid, Precision, Unit
from quant_fairness_plugin.model.architectures.experts import EXPERTS, find_mixture

TWIN = "--format fp16-twin (a plain 16-bit checkpoint with the dequantized values, which loads everywhere)"
STORED_BITS = 4
"""The only width of a whole checkpoint; single layers and units can have 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What somebody wants written, as far as it is known."""

    format: str
    grid: Grid
    overrides: Mapping[str, Precision]
    family: str | None
    """The family's name; None before the model is known, when the facts below are those of no family."""
    conv1d: bool = False
    """Whether the linear modules store their weight transposed."""
    head_on_disk: str = ""
    """The head's name in files and servers, where it is another one than in Transformers."""
    scaled_activation: str = ""
    """The activation of the MLP that Transformers divides by scales in an `awq` checkpoint."""
    group_sizes: frozenset[int] = frozenset()
    """Group sizes of the quantized modules; empty before the model is known."""
    wrapped: bool = False
    """Whether the text decoder is a part of the model, beside a vision tower or an audio encoder."""

    mixture: bool = False
    """Whether the model holds a mixture of experts."""
    dtype: str = ""
    """The 16-bit type that the model is stored in, as torch names it; empty before that is known."""

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What files call the matrices of an expert; empty where there are none."""
        mixture = find_mixture(self.family or "")
        return () if mixture is None else mixture.names

    @property
    def kept_experts(self) -> bool:
        """Whether the experts of a layer keep 16 bit, as far as that is known."""
        kept = any(
            kind == "fp16" and (Unit.is_layer(name) or name.endswith(f".{EXPERTS}"))
            for name, kind in self.overrides.items()
        )
        return self.mixture and kept

    @property
    def other_experts(self) -> bool:
        """Whether routed experts get other bits or groups: in a layer that does, or as its unit."""
        return self.mixture and any(
            kind in ("int8", FINE_GROUPS) and (Unit.is_layer(name) or name.endswith(f".{EXPERTS}"))
            for name, kind in self.overrides.items()
        )

    @property
    def floats(self) -> bool:
        """Whether the codes of the grid are floats."""
        return self.grid.scheme != "int"

    @property
    def int8(self) -> bool:
        """Whether a layer or unit gets 8 bits."""
        return "int8" in self.overrides.values()

    @property
    def simulated(self) -> tuple[str, ...]:
        """Precisions of single layers or units that no checkpoint holds."""
        return tuple(sorted({*self.overrides.values()} - {"fp16", "int8", FINE_GROUPS, "int4"}))

    @property
    def several_sizes(self) -> bool:
        """Whether modules have different group sizes."""
        return len(self._sizes) > 1

    @property
    def smallest_size(self) -> int:
        """The group size that fits every module that one fits."""
        return min((size for size in self._sizes if size > 0), default=-1)

    @property
    def _sizes(self) -> frozenset[int]:
        finest = {FINEST_GROUP} if FINE_GROUPS in self.overrides.values() else set()
        return (self.group_sizes or frozenset({self.grid.group_size})) | finest

    @property
    def single_units(self) -> tuple[str, ...]:
        """Overrides of single units, `layers.3.down`, rather than of whole layers."""
        return tuple(name for name in self.overrides if Unit.is_group(name))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a combination is not written, what can be written instead, and how to ask for it."""

    reason: str
    allowed: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.reason}; allowed {self.allowed}. Use {self.way_out}."


Rule = tuple[Callable[[Request], bool], Refusal]
"""A row: when a combination is refused, and the refusal; `{r.…}` in its texts is filled from the request."""


def first_refusal(rules: Iterable[Rule], request: Request) -> Refusal | None:
    """Return the refusal of the first row that applies, its texts filled in, or None."""
    for applies, refusal in rules:
        if applies(request):
            texts = (text.format(r=request) for text in (refusal.reason, refusal.allowed, refusal.way_out))
            return Refusal(*texts)
    return None
