"""Method `awq`: scaled input channels; the search for the scale is `quantize.awq`, where it goes `quantize.folding`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_fairness_plugin.artifacts import Clip
from quant_fairness_plugin.quantize.methods.method import Method

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel
    from quant_fairness_plugin.quantize.solving import Problem, Solved


class Awq(Method):
    """AWQ, whose scales are divided out of the module in front."""

    name: ClassVar[str] = "awq"
    needs_calibration: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    clip: ClassVar[Clip] = "absmax"  # it searches the ranges itself, by output error; another rule would replace that
    moves_scales: ClassVar[bool] = True
    keeps_columns: ClassVar[bool] = True

    def check_model(self, loaded: LoadedModel) -> None:
        """Refuse an architecture in which it is not known where scales can be folded."""
        from quant_fairness_plugin.quantize.folding import check_folds

        check_folds(loaded)

    def solve(self, problem: Problem, solved: Solved) -> None:
        """Solve the modules of a group with a common scale, and fold the scale."""
        from quant_fairness_plugin.quantize.solving import solve_awq_unit

        solve_awq_unit(problem, solved)
