"""What a sweep will run: its plans, its walks through the state tree, its text in tokens. Exact, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant_fairness_plugin.artifacts import Granularity, Grid, LanguageScores, Precision, StateScores, TextSet, Unit
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.measure.rows import TokenRows
from quant_fairness_plugin.model.outline import Outline
from quant_fairness_plugin.plans.plan_set import BASELINE, Plan, PlanSet, plan_name
from quant_fairness_plugin.plans.tree import State, StateTree, build_tree
from quant_fairness_plugin.plans.units import UnitMap, name_units
from quant_fairness_plugin.quantize.grid_rules import misfit, unit_grid

Plans = Mapping[str, Mapping[str, Precision]]


@dataclass(frozen=True, slots=True)
class Range:
    """Where the exact number is not known: between these two."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Range:
        """Both ends by a factor of 0 or more."""
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenized text set as the sweep batches it."""

    sentences: int
    languages: int
    scored: int
    """Tokens that are predicted."""
    batches: tuple[tuple[int, int, int], ...]
    """Per batch: rows, tokens of a row with padding, and tokens that are predicted."""

    @property
    def padded(self) -> int:
        """Tokens that a block is given, padding included."""
        return sum(rows * width for rows, width, _ in self.batches)

    @property
    def largest(self) -> tuple[int, int, int]:
        """The batch with most tokens, padding included."""
        return max(self.batches, key=lambda batch: batch[0] * batch[1])

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(width for _, width, _ in self.batches)

    @property
    def attended(self) -> int:
        """Pairs of tokens that attention compares, padding included."""
        return sum(rows * width * width for rows, width, _ in self.batches)


def count_text(tokenized: TokenRows, texts: TextSet, *, batch_tokens: int) -> Text:
    """Return the tokens and batches of a text set."""
    batches = tokenized.batches(batch_tokens)
    return Text(
        sentences=len(texts),
        languages=len(texts.languages),
        scored=sum(len(batch.targets) for batch in batches),
        batches=tuple((batch.ids.shape[0], batch.ids.shape[1], len(batch.targets)) for batch in batches),
    )


def unit_map(outline: Outline) -> UnitMap:
    """Return the units of a model of which only the outline is known."""
    return name_units(outline.family, outline.layers, outline.shapes)


def fitting_groups(outline: Outline, grid: Grid) -> tuple[str, ...]:
    """Return the fusion groups of all layers that a grid fits, as `layers.3.down`; the others stay in 16 bit.

    Raises:
        ConfigError: it fits none.
    """
    prefix = outline.family.blocks
    fitting = tuple(
        str(Unit(layer, unit.name))
        for layer in range(outline.layers)
        for unit in outline.family.units_of(layer)
        if _fits(grid, [outline.matrix(f"{prefix}.{layer}.{module}") for module in unit.modules])
    )
    if not fitting:
        raise ConfigError(f"rtn {grid} fits no module of the model; use another group size, or -1")
    return fitting


def _fits(grid: Grid, shapes: Sequence[tuple[int, int]]) -> bool:
    grid = unit_grid(grid, (cols for _, cols in shapes))
    return all(misfit(grid, *shape) is None for shape in shapes)


def kept_groups(outline: Outline, fitting: Sequence[str]) -> tuple[str, ...]:
    """Return the names of those fusion groups that the grid fits in no layer."""
    names = {Unit.parse(unit).group for unit in fitting}
    return tuple(name for name in outline.family.unit_names if name not in names)


def possible_walks(
    planned: PlanSet, units: UnitMap, around: Sequence[Plan] = ()
) -> tuple[list[StateTree], list[StateTree]]:
    """Return the trees of all walks of a sweep, for the least and the most block passes that it can come to.

    They are equal where every set is evaluated. Where only sets of leading units are, the passes depend on where these
    lie: sets of late layers share most of the way.

    Args:
        planned: the plans of the sweep.
        units: the model's units.
        around: plans that quantize what stands around the layers, in a walk of their own where there are any.
    """
    both = [_walk_all(planned, units, order) for order in (planned.units[::-1], planned.units)]
    last = [_tree(planned.precisions_of(around), units)] if around else []
    both = [[*trees, *last] for trees in both]
    return min(both, key=_total), max(both, key=_total)


def _walk_all(planned: PlanSet, units: UnitMap, order: Sequence[str]) -> list[StateTree]:
    """Return the walks of a sweep whose units count in this order."""
    trees = [_tree({}, units)]  # which languages the 16-bit model supports

    def score(plans: Plans) -> dict[str, StateScores]:
        trees.append(_tree(plans, units))
        return {name: _scores_in_order(name, order) for name in (BASELINE, *plans)}

    planned.evaluate(score)
    return trees


def _tree(plans: Plans, units: UnitMap) -> StateTree:
    states = [State(BASELINE, {}), *(State(name, units.expanded(plan)) for name, plan in plans.items())]
    return build_tree(states, units.stages)


def _scores_in_order(name: str, order: Sequence[str]) -> StateScores:
    """Return scores of a plan by which the units count in the given order, whatever the mode."""
    kl = {plan_name("protect-one", [unit]): float(place) for place, unit in enumerate(order)}
    kl |= {plan_name("quantize-one", [unit]): float(len(order) - place) for place, unit in enumerate(order)}
    row = LanguageScores(nll_nats=(0.0,), tokens=(1,), bytes_=(1,), kl_nats=(kl.get(name, 0.0),), flips=(0,))
    return StateScores(state=name, languages={"en": row})


def _total(trees: Sequence[StateTree]) -> int:
    return sum(tree.block_passes for tree in trees)


def swept_units(units: UnitMap, fitting: Sequence[str], granularity: Granularity) -> tuple[str, ...]:
    """Return the units that a sweep singles out: every layer, or every fusion group that the grid fits."""
    return tuple(str(Unit(layer)) for layer in range(units.layers)) if granularity == "layer" else tuple(fitting)
