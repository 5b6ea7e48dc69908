"""Method `gptq`: the integers whose outputs change least; the solver of one weight is `quantize.gptq`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quant_fairness_plugin.artifacts import Clip
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

    damp: float = 0.05
    """Share of the mean Hessian diagonal that is added to the diagonal."""
    act_order: bool = True
    """Columns by Hessian diagonal, largest first (static; nothing of it shows in the result's layout)."""

    def solve(self, problem: Problem, solved: Solved) -> None:
        """Solve the modules of a group, twice where some of their channels stay in 16 bit."""
        from quant_fairness_plugin.quantize.solving import solve_gptq_unit

        solve_gptq_unit(problem, solved, damp=self.damp, act_order=self.act_order)
