"""What a method of quantization says of itself. Plain facts: no torch is loaded before something is solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from quant_fairness_plugin.artifacts import Clip, Effort
from quant_fairness_plugin.quantize.grid_rules import BITS, CLIPS

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel
    from quant_fairness_plugin.quantize.solving import Problem, Solved

CLIPS_BY_WEIGHTS: tuple[Clip, ...] = tuple(clip for clip in CLIPS if clip != "minimax")
"""The clipping rules that need nothing but the weights."""


class Method(ABC):
    """How the integers of a fusion group are computed, and what that takes.

    A new method is a subclass in a file of this package and one line of `METHODS`; everything else asks the facts here.
    """

    name: ClassVar[str]
    """The name of `--method` and of the record in a checkpoint."""
    needs_calibration: ClassVar[bool]
    """Whether it uses the moments of the inputs, or the weights alone."""
    symmetric: ClassVar[bool] = True
    """Whether its grids have no zero points where the user does not say."""
    clips: ClassVar[tuple[Clip, ...]] = CLIPS_BY_WEIGHTS
    """The clipping rules of a grid that it can be used with."""
    clip: ClassVar[Clip] = "mse"
    """Its rule where the user does not say."""
    bits: ClassVar[tuple[int, ...]] = BITS
    """The widths that it rounds to."""
    floats: ClassVar[bool] = False
    """Whether it rounds to the floats of `quantize.schemes`, too."""
    moves_scales: ClassVar[bool] = False
    """Whether it scales input channels and divides the module in front by that, which changes 16-bit values too."""
    keeps_columns: ClassVar[bool] = False
    """Whether it can leave some input channels of a module in 16 bit beside the integers."""
    timed: ClassVar[bool] = False
    """Whether `forecast.solving` times its solver, so that a run's time is known before it."""

    def check_model(self, loaded: LoadedModel) -> None:  # noqa: B027 - a method without conditions is the rule
        """Refuse a model that the method cannot solve, before the work begins.

        Raises:
            UnsupportedModelError: says what is not known of the model.
        """

    efforts: ClassVar[tuple[Effort, ...]] = ("normal",)
    """What it can do more or less work for."""

    def at(self, effort: Effort) -> Method:
        """Return the method with the options of one of its `efforts`."""
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Its options by name; empty where it has none."""
        return asdict(self) if is_dataclass(self) else {}

    @property
    def compares_inputs(self) -> bool:
        """Whether it wants to know, too, what a module is given in the 16-bit model."""
        return False

    @abstractmethod
    def solve(self, problem: Problem, solved: Solved) -> None:
        """Add the integers of every module of a fusion group to what is solved.

        Torch is loaded here at the earliest.

        Args:
            problem: the group's weights and grids, and where `needs_calibration` the moments of its inputs.
            solved: what the groups before it came to; `tensors` gets one entry per module.
        """
