"""`quant-fairness report`: one HTML page from what other commands saved; and the page that these commands write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant_fairness_plugin.artifacts import RECORD_NAME, ExportRecord, Measurement, load, write_atomically
from quant_fairness_plugin.artifacts.gates import Gate
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError, MissingExtraError, ResourceError
from quant_fairness_plugin.report.drawing import check_drawing

if TYPE_CHECKING:
    from quant_fairness_plugin.report.sources import Artifact

REPORT_NAME = "report.html"


@options(config=("gate",), file=False)
def report(
    config: FairConfig,
    artifacts: Annotated[
        list[Path],
        typer.Argument(
            metavar="ARTIFACT...", help="A checkpoint folder, or a measurement, sweep, plan or evidence as JSON."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Page to write.", rich_help_panel="Output")
    ] = Path(REPORT_NAME),
) -> None:
    """Write one HTML page, which opens offline, about saved artifacts of one model. No model is loaded."""
    _check_place(output)
    check_drawing()

    # Loads Altair.
    from quant_fairness_plugin.report.page import render_report
    from quant_fairness_plugin.report.sources import read_sources

    html = render_report(read_sources(artifacts), gate=_gate(config))
    write_atomically(output, html.encode())
    typer.echo(f"{output}: {len(html.encode()) / 1e3:.0f} kB; open it in a browser")


def write_report(path: Path, artifacts: Iterable[Artifact], config: FairConfig) -> None:
    """Write a page beside a result, or say on stderr why there is none: the result must not be lost over it."""
    try:
        check_drawing()

        # Loads Altair.
        from quant_fairness_plugin.report.page import render_report
        from quant_fairness_plugin.report.sources import Sources

        write_atomically(path, render_report(Sources.of(artifacts), gate=_gate(config)).encode())
    except (MissingExtraError, ResourceError) as err:
        typer.echo(f"no {path.name} was written: {err}", err=True)
    except Exception as err:  # noqa: BLE001 - whatever a drawing fails of, hours of work are in the result
        said = " ".join(str(err).split())
        typer.echo(f"no {path.name} was written ({type(err).__name__}: {said}); try quant-fairness report", err=True)


def report_checkpoint_folder(
    folder: Path, measured: Measurement, config: FairConfig, others: Iterable[Artifact] = ()
) -> None:
    """Write the page into a folder that is still being made, so that the record lists it with its checksum.

    Args:
        folder: with the record, which has no measurement yet.
        measured: what the record will hold.
        config: for its gate.
        others: what else the page shows.
    """
    record = replace(load(ExportRecord, folder / RECORD_NAME), measurement=measured)
    write_report(folder / REPORT_NAME, [record, *others], config)


def read_next(record: ExportRecord, out: Path) -> str:
    """Say which files of a checkpoint are for people."""
    page = f"{out / REPORT_NAME}, a page for a browser; " if REPORT_NAME in record.files else ""
    return f"To read: {page}{out / 'README.md'}, the model card"


def _gate(config: FairConfig) -> Gate | None:
    return None if config.gate is None else Gate.parse(config.gate)


def _check_place(output: Path) -> None:
    """Refuse a place where the page would make a checkpoint invalid, or that is a folder."""
    if (output.parent / RECORD_NAME).is_file():
        raise ConfigError(
            f"{output} lies in a checkpoint folder, whose record lists all its files with checksums; the page must be "
            "elsewhere. Choose another --output"
        )
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; name the file to write, such as {output / REPORT_NAME}")
