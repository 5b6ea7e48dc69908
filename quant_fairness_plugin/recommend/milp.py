"""The integer program behind an allocation: one cell per unit and precision, one cell picked per unit.

Takes exact bytes and damages as arrays, returns picked cells; bytes and damages are counted again outside the solver.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy

from quant_fairness_plugin.artifacts import Precision
from quant_fairness_plugin.measure.metrics import Array

TIE = 1e-6
"""Damages count as equal within this share of the largest one: the solver's integers are exact to 1e-6."""
SPAN = 1e3
"""Rows are scaled to this largest coefficient, so that the solver's absolute gap (1e-6) is far below `TIE`."""
WHOLE = 1e5
"""Up to this size, rows of bytes are given to the solver as integers, in which no byte can hide in its tolerance."""
NODES = 200
"""Where the search for a proof ends. A count, not seconds: the result is the same on a slow machine."""
NODE_LIMIT_REACHED = 1  # scipy.optimize.milp's status
ATTEMPTS = 8


@dataclass(frozen=True, slots=True)
class Selection:
    """One choice."""

    picked: tuple[int, ...]
    """One cell per unit."""
    bytes_: int
    value: float
    gap: float
    """Relative, from the solver; 0 where it proved that nothing is better."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Cells are pairs of a unit and one of its precisions; exactly one per unit is picked."""

    cells: tuple[tuple[str, Precision], ...]
    languages: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each cell, exact."""
    harm: Array
    """[languages, cells]"""
    base: Array
    """[languages]"""
    rows: Array
    """[rows, languages]: the objective is the largest row of `rows · damage` (one row for a mean)."""
    mean: Array
    """[languages], sums to 1: the last tie-break."""
    objective: str
    """Its name."""
    caps: Array
    """[languages]: the largest damage of each, infinite where there is no limit."""

    @property
    def capped(self) -> bool:
        """Whether any language has a limit."""
        return bool(np.isfinite(self.caps).any())

    @property
    def tie(self) -> float:
        """Objectives closer than this are equal."""
        return TIE * float(max(np.abs(self.harm).max(), np.abs(self.base).max()))

    @property
    def fewest_bytes(self) -> int:
        """Bytes of the smallest choice."""
        return sum(min(self.sizes[cell] for cell in cells) for cells in self.by_unit.values())

    @property
    def by_unit(self) -> dict[str, list[int]]:
        """Unit → its cells."""
        cells: dict[str, list[int]] = {}
        for i, (unit, _) in enumerate(self.cells):
            cells.setdefault(unit, []).append(i)
        return cells

    def damage(self, picked: tuple[int, ...]) -> Array:
        """Return the predicted damage of a choice: [languages]."""
        total: Array = self.base + self.harm[:, list(picked)].sum(axis=1)
        return total

    def solve(
        self, minimise: Literal["value", "bytes", "mean"], *, max_bytes: int | None = None, max_value: float = math.inf
    ) -> Selection | None:
        """Return the best choice, its bytes counted again in integers; None where there is none."""
        limit = max_bytes
        for _ in range(ATTEMPTS):
            selection = self._solve(minimise, limit, max_value)
            if selection is None or max_bytes is None or limit is None or selection.bytes_ <= max_bytes:
                return selection
            # The solver's rows are exact to 1e-7 of their scale, which can be some bytes of a large model.
            limit -= selection.bytes_ - max_bytes
        return None

    @property
    def smallest(self) -> Selection:
        """The choice with the fewest bytes, the least harmful of equals; nothing is said about its value."""
        picked = tuple(
            min(cells, key=lambda cell: (self.sizes[cell], float((self.rows @ self.harm)[:, cell].max())))
            for cells in self.by_unit.values()
        )
        return Selection(picked, self.fewest_bytes, float((self.rows @ self.damage(picked)).max()), 1.0)

    def _solve(self, minimise: str, max_bytes: int | None, max_value: float) -> Selection | None:
        """One call of the solver. The variables are the cells (0 or 1) and the objective's value, last."""
        cells, units = len(self.cells), list(self.by_unit.values())
        per_damage = SPAN / (float(np.abs(self.harm).max()) or 1.0)
        costs = {
            "value": np.append(np.zeros(cells), 1.0),
            "bytes": np.append(self._extra_bytes(), 0.0),
            "mean": np.append(per_damage * (self.mean @ self.harm), 0.0),
        }[minimise]
        result = _search(
            costs,
            scipy.optimize.Bounds(
                np.append(np.zeros(cells), -np.inf), np.append(np.ones(cells), per_damage * max_value)
            ),
            self._rules(per_damage, max_bytes),
        )
        if result.x is None:
            return None
        picked = tuple(cells_of[int(np.argmax(result.x[cells_of]))] for cells_of in units)
        value = float((self.rows @ self.damage(picked)).max())
        gap = 0.0 if result.status == 0 else min(1.0, float(result.mip_gap))
        return Selection(picked, sum(self.sizes[cell] for cell in picked), value, gap)

    def _rules(self, per_damage: float, max_bytes: int | None) -> list[scipy.optimize.LinearConstraint]:
        """One cell per unit; every row of the objective below its value; the budget, if there is one."""
        units = list(self.by_unit.values())
        one_each = np.zeros((len(units), len(self.cells) + 1))
        for row, cells_of in enumerate(units):
            one_each[row, cells_of] = 1.0
        below = np.hstack([per_damage * (self.rows @ self.harm), np.full((len(self.rows), 1), -1.0)])
        rules = [
            scipy.optimize.LinearConstraint(one_each, 1.0, 1.0),
            scipy.optimize.LinearConstraint(below, -np.inf, -per_damage * (self.rows @ self.base)),
        ]
        if self.capped:
            limited = np.isfinite(self.caps)
            harm = np.hstack([per_damage * self.harm[limited], np.zeros((int(limited.sum()), 1))])
            rules.append(scipy.optimize.LinearConstraint(harm, -np.inf, per_damage * (self.caps - self.base)[limited]))
        if max_bytes is not None:
            extra = self._extra_bytes()
            scale = min(1.0, WHOLE / (extra.max() or 1.0))
            room = scale * (max_bytes - self.fewest_bytes) / self._byte_unit()
            rules.append(scipy.optimize.LinearConstraint(np.append(scale * extra, 0.0)[None], -np.inf, room))
        return rules

    def _extra_bytes(self) -> Array:
        """[cells]: bytes over the smallest cell of the same unit, as whole multiples of `_byte_unit`.

        The solver's gap of 1e-6 cannot then hide one of them.
        """
        return np.array(self._extra(), dtype=np.float64) / self._byte_unit()

    def _byte_unit(self) -> int:
        return math.gcd(*self._extra()) or 1

    def _extra(self) -> list[int]:
        least = {unit: min(self.sizes[cell] for cell in cells) for unit, cells in self.by_unit.items()}
        return [size - least[unit] for (unit, _), size in zip(self.cells, self.sizes, strict=True)]


def _search(
    costs: Array, bounds: scipy.optimize.Bounds, rules: list[scipy.optimize.LinearConstraint]
) -> scipy.optimize.OptimizeResult:
    """Look for the optimum up to `NODES`, and further where there is no solution at all by then."""
    integrality = np.append(np.ones(len(costs) - 1), 0.0)
    for limits in ({"node_limit": NODES}, {}):
        options = {"mip_rel_gap": 0.0, **limits}
        result = scipy.optimize.milp(costs, integrality=integrality, bounds=bounds, constraints=rules, options=options)
        if result.x is not None or result.status != NODE_LIMIT_REACHED:
            break
    return result
