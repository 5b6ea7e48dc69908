"""Method `rtn`: each weight to the nearest grid point."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_fairness_plugin.quantize.methods.method import Method

if TYPE_CHECKING:
    from quant_fairness_plugin.quantize.solving import Problem, Solved


class Rtn(Method):
    """Round to nearest: no calibration, and the baseline of the others."""

    name: ClassVar[str] = "rtn"
    needs_calibration: ClassVar[bool] = False
    floats: ClassVar[bool] = True

    def solve(self, problem: Problem, solved: Solved) -> None:
        """Round the modules of a group."""
        from quant_fairness_plugin.quantize.solving import solve_rtn_unit

        solve_rtn_unit(problem, solved)
