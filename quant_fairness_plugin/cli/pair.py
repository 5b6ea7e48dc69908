"""`quant-fairness compare A B`: two checkpoints of one model, each against the original, and one against the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from quant_fairness_plugin.artifacts import Interval, Number, save, to_json
from quant_fairness_plugin.artifacts.pairs import CheckpointPair
from quant_fairness_plugin.checkpoint.original import check_original
from quant_fairness_plugin.checkpoint.others import readable_folder
from quant_fairness_plugin.cli.damage import language_notes
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import describe_original, describe_part, show
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, QualityGateError
from quant_fairness_plugin.preflight import ModelSource, preflight
from quant_fairness_plugin.statistics.pairs import PairVerdict, judge_pair
from quant_fairness_plugin.texts.languages import language_name

if TYPE_CHECKING:
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

_SAMPLED = ("method", "scheme", "bits", "group_size", "symmetric", "protect_layers", "top", "max_overhead")
"""Settings of a quantization, which is not done here."""


def check_pair(config: FairConfig, checkpoints: list[Path], margin: float | None, **given: object) -> None:
    """Refuse what a comparison of checkpoints would ignore, and another number of them than two.

    Args:
        config: the configuration.
        checkpoints: as typed.
        margin: as typed.
        **given: further options by name; what is true was given.

    Raises:
        ConfigError: names them.
    """
    if len(checkpoints) != 2:
        raise ConfigError(
            f"{len(checkpoints)} checkpoint given, and a comparison takes two: compare A B --model ORIGINAL; "
            "one alone is measured: quant-fairness measure DIR"
        )
    if margin is not None and not margin >= 0:
        raise ConfigError(f"--margin {margin:g}: accepted is a number of bits per byte, 0 or more, such as 0.01")
    default = FairConfig()
    fields = [name for name in _SAMPLED if getattr(config, name) != getattr(default, name)]
    others = [name.replace("_", " ") for name in (*fields, *(name for name, value in given.items() if value))]
    if others:
        raise ConfigError(
            f"two checkpoints are compared as they are, so {', '.join(others)} do nothing; leave that out, or the "
            "checkpoints"
        )


def compare_pair(
    source: ModelSource,
    config: FairConfig,
    checkpoints: list[Path],
    margin: float | None,
    *,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure two checkpoints on the same sentences and print what the second loses beyond the first.

    Raises:
        QualityGateError: it loses more than the margin, or the sentences cannot tell.
    """
    checked = preflight(source, config)
    folders = [readable_folder(path) for path in checkpoints]
    for folder in folders:
        check_original(folder, checked.files)

    # Loads torch.
    from quant_fairness_plugin.fair_quantizer import FairQuantizer

    with progress() as tell:
        quantizer = FairQuantizer.from_source(source, config, checked=checked, progress=tell, stream=True)
        pair = _measure(quantizer, folders)
    if output is not None:
        save(pair, output)
    verdict = judge_pair(pair, margin or 0.0)
    if as_json:
        typer.echo(to_json(pair), nl=False)
    else:
        _show(pair, verdict, checkpoints, source.name)
    if margin is not None and verdict.decision != "NO WORSE":
        raise QualityGateError(f"margin {margin:g} is not kept. {verdict}")


def _measure(quantizer: FairQuantizer, folders: list[Path]) -> CheckpointPair:
    from quant_fairness_plugin import steps

    names = ("A", "B")
    compared = [steps.check_folder(folder, quantizer.loaded) for folder in folders]
    states = [
        steps.exported_state(folder, quantizer.loaded, name=name) for name, folder in zip(names, folders, strict=True)
    ]
    measured = quantizer.measure(*states)
    described = {
        name: steps.measured_folder(measured.measurements[name], folder, quantizer.texts, "confirm", compared=known)
        for name, folder, known in zip(names, folders, compared, strict=True)
    }
    return measured.described(described).pair(*names)


def _show(pair: CheckpointPair, verdict: PairVerdict, checkpoints: list[Path], model: str) -> None:
    """Print the verdict, the table and what both were measured on."""
    say(verdict)
    for name, path, measured in zip("AB", checkpoints, (pair.first, pair.second), strict=True):
        say(f"{name} = {path} {describe_original(measured, model)}")
    table = Table(title=f"KL on {describe_part(pair.first)}", box=None, pad_edge=False, title_justify="left")
    table.add_column("language")
    for head in ("16 bit", "A", "B", "B − A", "95 % interval"):
        table.add_column(head, justify="right", no_wrap=True)
    for first, second in zip(pair.first.languages, pair.second.languages, strict=True):
        cells = [f"{1000 * row.kl_bits_per_byte.estimate:.0f}" for row in (first, second)]
        lost = next((row.status for row in (first, second) if row.status != "supported"), "")
        cells += _cells(pair.differences[first.language]) if not lost else ["", lost]
        name = f"{language_name(first.language)} {first.language}"
        table.add_row(name, f"{first.baseline_bpb:.3f}", *cells, style="dim" if lost else "")
    table.add_section()
    for name, first_figure, second_figure, difference in (
        ("worst", pair.first.worst_kl, pair.second.worst_kl, pair.worst),
        ("mean", pair.first.mean_kl, pair.second.mean_kl, pair.mean),
    ):
        table.add_row(name, "", _figure(first_figure), _figure(second_figure), *_cells(difference))
    show(table)
    typer.echo("KL in thousandths of a bit per byte; * = the paired interval excludes 0")
    notes = [note for measured in (pair.first, pair.second) for note in language_notes(measured)]
    for note in dict.fromkeys(notes):
        say(note)


def _cells(difference: Number) -> list[str]:
    if not isinstance(difference, Interval):
        return ["undefined", ""]
    star = "*" if difference.low > 0 or difference.high < 0 else " "
    return [
        f"{1000 * difference.estimate:+.1f}{star}",
        f"[{1000 * difference.low:+.1f}, {1000 * difference.high:+.1f}]",
    ]


def _figure(value: Number) -> str:
    return f"{1000 * value.estimate:.0f}" if isinstance(value, Interval) else "undefined"
