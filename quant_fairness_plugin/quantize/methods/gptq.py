"""Method `gptq`: the integers whose outputs change least; the solver of one weight is `quantize.gptq`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from quant_fairness_plugin.artifacts import Clip, Effort
from quant_fairness_plugin.quantize.grid_rules import CLIPS
from quant_fairness_plugin.quantize.methods.method import Method

if TYPE_CHECKING:
    from quant_fairness_plugin.quantize.solving import Problem, Solved


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Method):
    """GPTQ, with the moments of every language in its Hessian."""

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True
    clips: ClassVar[tuple[Clip, ...]] = CLIPS
    keeps_columns: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    efforts: ClassVar[tuple[Effort, ...]] = ("fast", "normal", "best")

    damp: float = 0.05
    """Share of the mean Hessian diagonal that is added to the diagonal."""
    act_order: bool = True
    """Columns by Hessian diagonal, largest first (static; nothing of it shows in the result's layout)."""
    compensates: bool = True
    """Whether modules make up for what those in front of them have lost (`quantize.compensation`). Routed experts do
    not, and none does in a plan that keeps input channels in 16 bit."""
    compensation_damp: float = 0.2
    """Share of the mean Hessian diagonal that holds this back where the calibration text says little."""
    refinements: int = 2
    """How often scales and integers are solved again afterwards, each for the others; see `quantize.refinement`."""

    def at(self, effort: Effort) -> Gptq:
        """Return GPTQ as published for `fast`; for `best`, with more rounds behind it."""
        match effort:
            case "fast":
                return replace(self, compensates=False, refinements=0)
            case "best":
                return replace(self, refinements=6)
            case _:
                return self

    @property
    def compares_inputs(self) -> bool:
        """Whether it wants to know, too, what a module is given in the 16-bit model."""
        return self.compensates

    def solve(self, problem: Problem, solved: Solved) -> None:
        """Solve the modules of a group, twice where some of their channels stay in 16 bit."""
        from quant_fairness_plugin.quantize.solving import compensating, solve_gptq_unit

        wanted = compensating(problem, damp=self.compensation_damp)
        solve_gptq_unit(wanted, solved, damp=self.damp, act_order=self.act_order, refinements=self.refinements)
