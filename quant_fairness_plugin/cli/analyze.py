"""`quant-fairness analyze`: one question about a model. Tables are rendered from the fields of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quant_fairness_plugin.analysis.kinds import ANALYSES, find_analysis
from quant_fairness_plugin.analysis.request import AnalysisOptions, Request, SavedRequest, check_options
from quant_fairness_plugin.artifacts import AnalysisAnswer, Interval, Undefined, from_json, write_atomically
from quant_fairness_plugin.cli.declare import options
from quant_fairness_plugin.cli.options import COMPUTE, INTEGERS, TEXTS, Access, Json, OutputFile
from quant_fairness_plugin.cli.progress import progress
from quant_fairness_plugin.cli.report import write_report
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import show
from quant_fairness_plugin.config import FairConfig
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.devices import describe_device
from quant_fairness_plugin.preflight import ModelSource, preflight

if TYPE_CHECKING:
    from quant_fairness_plugin.model.load import LoadedModel

_FRACTION = re.compile(r"-?[\d.]*[.e][-+\d.e]*( \[.*\])?")
_MOST_KEYS = 3
MOST_ROWS = 60
"""Of a table on the terminal; --json has larger ones."""


@options(config=(*INTEGERS, *TEXTS, *COMPUTE), file=False)
def analyze(
    config: FairConfig,
    extra: AnalysisOptions,
    access: Access,
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Which question; --list names them.")] = None,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As everywhere: demo, a Hub id, a folder.")
    ] = None,
    every: Annotated[bool, typer.Option("--list", help="Name the questions.", rich_help_panel="Output")] = False,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Answer one question about a model: how its weights, tokens and representations are, and what changes do."""
    if every or kind is None:
        _list(as_json=as_json)
        return
    analysis = find_analysis(kind)
    check_options(kind, analysis.takes, extra)
    computed: dict[str, str] = {}
    request = SavedRequest(config=config, options=extra)
    if analysis.reads_model:
        request = _about_model(request, access.source(model), computed)
    elif model is not None:
        raise ConfigError(f"analyze {kind} reads saved files and takes no model; leave {model} out")
    with progress() as shown:
        result = analysis.run(replace(request, progress=lambda done, total: shown(kind, done, total)))
    provenance = request.provenance(reads_texts=analysis.reads_texts) | computed
    document = {"schema_version": 1, "kind": "analysis", "analysis": kind, "question": analysis.question}
    document |= {"provenance": provenance, "result": asdict(result)}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    if output is not None:
        write_atomically(output, text.encode())
        write_report(output.with_suffix(".html"), [from_json(AnalysisAnswer, text, str(output))], config)
    if as_json:
        typer.echo(text, nl=False)
        return
    for line in lines(result):
        show(line, keys=_keys(line)) if isinstance(line, Table) else say(line)


def _about_model(request: SavedRequest, source: ModelSource, computed: dict[str, str]) -> Request:
    """Return the request about a model; what it is computed with is noted once it is loaded."""
    config = request.config
    checked = preflight(source, config)

    @cache
    def load() -> LoadedModel:
        # Loads torch.
        from quant_fairness_plugin.steps import load_checked

        loaded = load_checked(checked, source, config)
        computed["device"] = describe_device(loaded.model.device)
        computed["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
        return loaded

    return Request(files=checked.files, texts=checked.texts, config=config, options=request.options, load=load)


def _list(*, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: analysis.question for name, analysis in ANALYSES.items()}, indent=1))
        return
    for name, analysis in ANALYSES.items():
        say(f"{name:<16}{analysis.question}", indent=16)


def lines(result: object) -> Iterator[str | Table]:
    """Yield what a person reads of an answer: its plain fields as lines, its rows as tables.

    Numbers per sentence, which tests and intervals are made of, are left to --json.

    Raises:
        ConfigError: the answer is no dataclass.
    """
    if not is_dataclass(result):
        raise ConfigError(f"an answer of type {type(result).__name__} cannot be shown; expected a dataclass")
    for field in fields(result):
        value = getattr(result, field.name)
        title = field.name.replace("_", " ")
        if isinstance(value, tuple) and len(value) > MOST_ROWS:
            yield f"{title}: {len(value)} rows, in --json"
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            yield _table(title, value)
        elif not (_per_sentence(value) or value == ()):
            yield f"{title}: {_cell(value)}"


def _keys(table: Table) -> int:
    """Return how many of the first columns name a row: those in front of the first figure with a fraction."""
    columns = [list(column.cells) for column in table.columns]
    figure = (index for index, cells in enumerate(columns) if any(_FRACTION.fullmatch(str(cell)) for cell in cells))
    return min(_MOST_KEYS, max(1, next(figure, 1)))


def _table(title: str, rows: tuple[Any, ...]) -> Table:
    columns = [field.name for field in fields(rows[0]) if not _per_sentence(getattr(rows[0], field.name))]
    table = Table(*(name.replace("_", " ") for name in columns), title=title)
    reasons: dict[str, None] = {}
    for row in rows:
        values = [getattr(row, name) for name in columns]
        reasons |= {value.undefined: None for value in values if isinstance(value, Undefined)}
        table.add_row(*("undefined" if isinstance(value, Undefined) else _cell(value) for value in values))
    if reasons:
        more = f" (and {len(reasons) - 1} other reasons, in --json)" if len(reasons) > 1 else ""
        table.caption = f"undefined: {next(iter(reasons))}{more}"
    return table


def _per_sentence(value: object) -> bool:
    return isinstance(value, dict) or is_dataclass(value) and not isinstance(value, Interval | Undefined)


def _cell(value: object) -> str:
    match value:
        case Undefined():
            return f"undefined: {value.undefined}"
        case Interval():
            return f"{value.estimate:.4g} [{value.low:.4g}, {value.high:.4g}]"  # they span orders of magnitude
        case float():
            return f"{value:.4g}"
        case None:
            return ""
        case tuple():
            return ", ".join(map(_cell, value))
    return str(value)
