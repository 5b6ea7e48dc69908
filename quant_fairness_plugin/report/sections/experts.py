"""Which languages use experts that calibration hardly reached, in a mixture of experts."""

from __future__ import annotations

from quant_fairness_plugin.artifacts import ExpertCoverage, ExpertUse, Unit
from quant_fairness_plugin.report import charts
from quant_fairness_plugin.report.section import Key, Picture, Section, Table, shade
from quant_fairness_plugin.report.words import Cell, Figure, Language

_READING = (
    "Why does it matter?",
    "In every layer the model sends each token to a few of its experts. An expert that calibration hardly reached is "
    "rounded without knowing its inputs. The share is weighted by how much the model relies on each expert for the "
    "language.",
)


def experts_section(coverage: ExpertCoverage) -> Section:
    """Return the map of layers and languages: the share of gate weights on experts with too few tokens."""
    languages = coverage.languages
    uses = {layer: [coverage.use(language, layer) for language in languages] for layer in coverage.reached}
    columns = [Language.of(language).label for language in languages]
    cells = [
        charts.Tile(
            row=_layer(layer), column=column, shade=shade(use.gates_few_own, 1.0, charts.CLASSES), text=_share(use)
        )
        for layer, row in uses.items()
        for column, use in zip(columns, row, strict=True)
    ]
    worst = max((use for row in uses.values() for use in row), key=lambda use: use.gates_few_own)
    few = f"fewer than {coverage.enough} calibration tokens of its own"
    lead = (
        f"Most exposed is {Language.of(worst.language).name} in layer {_layer(worst.layer)}: {_share(worst)} % of its "
        f"gate weights fall on experts with {few}."
    )
    return Section(
        name="experts",
        title="Which languages rely on experts that calibration hardly saw",
        level="practitioner",
        lead=lead,
        picture=Picture.of(lambda width: charts.tiles(cells, columns=columns, width=width), lead),
        keys=(
            Key(symbol="shade-low", text="none"),
            Key(symbol="shade-high", text=f"all gate weights on experts with {few}; figures in percent"),
        ),
        table=_table(coverage, uses),
        notes=(_READING,),
    )


def _layer(name: str) -> str:
    return Unit.parse(name).short


def _share(use: ExpertUse) -> str:
    return f"{100 * use.gates_few_own:.0f}"


def _table(coverage: ExpertCoverage, uses: dict[str, list[ExpertUse]]) -> Table:
    def cells(use: ExpertUse) -> tuple[Cell, ...]:
        counts = (Figure(f"{count} of {coverage.experts}") for count in (use.used, use.few, use.few_own))
        return _layer(use.layer), Language.of(use.language), *counts, Figure(f"{use.gates_few_own:.1%}")

    return Table(
        caption=f"Experts by layer and language, on part {coverage.part}; few: fewer than {coverage.enough} tokens.",
        columns=("layer", "language", "used", "few of all languages", "few of its own", "share of gate weights"),
        rows=tuple(cells(use) for row in uses.values() for use in row),
    )
