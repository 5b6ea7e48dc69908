"""Method `gptq`: the integers whose outputs change least; the solver of one weight is `quantize.gptq`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from quant_fairness_plugin.artifacts import Clip, Effort
from quant_fairness_plugin.quantize.grid_rules import CLIPS
from quant_fairness_plugin.quantize.methods.method import Method

if TYPE_CHECKING:
    from quant_fairness_plugin.quantize.solving import Problem, Solved


LEAST_DAMP = 0.01
"""What Frantar et al. add, with more tokens than most calibrations have."""
MOST_DAMP = 10.0
"""Given for want of tokens; a Hessian that takes more to be solved gets it (`gptq.MAX_DAMP`)."""
MOST_SHRINKING = 0.5
"""Of what channels have in common, for want of tokens."""
ONE_PASS_DAMP = 0.05
"""Of GPTQ with nothing behind it."""
EXPERTS_DAMP = 0.05
"""Of routed experts, whose moments are filled up with those of their layer: not by tokens, as no other was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Method):
    """GPTQ, with the moments of every language in its Hessian."""

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True
    clips: ClassVar[tuple[Clip, ...]] = CLIPS
    floats: ClassVar[bool] = True
    keeps_columns: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    efforts: ClassVar[tuple[Effort, ...]] = ("fast", "normal", "best")

    damp: float | None = None
    """Share of the mean Hessian diagonal that is added to the diagonal; None: by the tokens, see `damping`."""
    doubt: float = 1.0
    """Damping for as many tokens as a matrix has columns, and the share that is taken off what two of them have in
    common."""
    compensation_doubt: float = 10.0
    """Damping of what makes up for the modules in front, as a multiple of that of the rest."""
    act_order: bool = True
    """Columns by Hessian diagonal, largest first (static; nothing of it shows in the result's layout)."""
    compensates: bool = True
    """Whether modules make up for what those in front of them have lost (`quantize.compensation`). Routed experts do
    not, and none does in a plan that keeps input channels in 16 bit."""
    refinements: int = 4
    """How often scales and integers are solved again afterwards, each for the others; see `quantize.refinement`."""

    def at(self, effort: Effort) -> Gptq:
        """Return GPTQ as published for `fast`; for `best`, with more rounds behind it."""
        match effort:
            case "fast":
                # Not by tokens: where nothing is compensated that gains nothing (*refined* in docs/calibration.md).
                damp = ONE_PASS_DAMP if self.damp is None else self.damp
                return replace(self, compensates=False, refinements=0, damp=damp)
            case "best":
                return replace(self, refinements=8)
            case _:
                return self

    def damping(self, columns: int, tokens: float | None) -> float:
        """Return the damping of a matrix of so many input channels.

        The second moments of few tokens differ from those of all text by a share of their mean that grows with the
        channels and falls with the tokens. What it costs to trust them further is in the table of efforts of
        `docs/calibration.md`.

        Args:
            columns: input channels.
            tokens: that the moments are the mean of; of languages with different weights, as many as would tell as much
                if all counted the same; None for routed experts.
        """
        if self.damp is not None:
            return self.damp
        if tokens is None:
            return EXPERTS_DAMP
        return min(max(LEAST_DAMP, self.doubt * columns / tokens), MOST_DAMP)

    def shrinking(self, columns: int, tokens: float | None) -> float:
        """Return the share that is taken off the moments of two different channels; arguments as of `damping`.

        Each channel's own moment is a mean of squares and soon right; what two of them have in common is mostly what
        happened to come together in few tokens (shrinking towards the diagonal: Schäfer and Strimmer, "A Shrinkage
        Approach to Large-Scale Covariance Matrix Estimation").
        """
        if self.damp is not None or tokens is None:
            return 0.0
        return min(self.doubt * columns / tokens, MOST_SHRINKING)

    @property
    def compares_inputs(self) -> bool:
        """Whether it wants to know, too, what a module is given in the 16-bit model."""
        return self.compensates

    def solve(self, problem: Problem, solved: Solved) -> None:
        """Solve the modules of a group, twice where some of their channels stay in 16 bit."""
        from quant_fairness_plugin.quantize.solving import compensating, shrink, solve_gptq_unit

        columns, tokens = next(iter(problem.weights.values())).shape[1], problem.inputs.tokens
        shrink(problem.inputs.hessians, self.shrinking(columns, tokens))
        damp = self.damping(columns, tokens)
        factor = 1.0 if self.damp is not None else self.compensation_doubt
        wanted = compensating(problem, damp=min(factor * damp, MOST_DAMP))
        solve_gptq_unit(wanted, solved, damp=damp, act_order=self.act_order, refinements=self.refinements)
