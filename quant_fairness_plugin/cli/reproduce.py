"""`quant-fairness reproduce`: claims of the research scripts, by their rule and by ours, side by side."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quant_fairness_plugin.artifacts import package_versions, temporary_folder, write_atomically
from quant_fairness_plugin.claims.ledger import Claim, read_ledger
from quant_fairness_plugin.claims.reproduction import Finding, Reproduction
from quant_fairness_plugin.cli.options import Json, OutputFile
from quant_fairness_plugin.cli.say import say
from quant_fairness_plugin.cli.tables import show
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError
from quant_fairness_plugin.model.resolve import ModelFiles, model_sha256, resolve_model
from quant_fairness_plugin.plans.controls import gateway_layers

if TYPE_CHECKING:
    from quant_fairness_plugin.claims.legacy import LegacyFigures


def reproduce(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Claims; all where none is named. --list names them.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help="As everywhere.", rich_help_panel="Model")] = "demo-gpt2",
    every: Annotated[
        bool, typer.Option("--list", help="Print the claims and run nothing.", rich_help_panel="Output")
    ] = False,
    output: OutputFile = None,
    as_json: Json = False,
) -> None:
    """Run claims of the research scripts: their figure, the same by their rule on this model, and ours.

    A command that answers several claims runs once.
    """
    ledger = read_ledger()
    claims = ledger.chosen(ids or ())
    if every:
        _list(claims, as_json=as_json)
        return
    files = resolve_model(model)
    with _reproduction(context, files, model) as reproduction:
        findings = []
        for number, claim in enumerate(claims, start=1):
            typer.echo(f"{claim.id} ({number} of {len(claims)}) …", err=True)
            findings.append(reproduction.reproduce(claim))
    seconds = {name: round(value, 1) for name, value in reproduction.seconds.items()}
    _print(files, findings, seconds, output, as_json=as_json)


@contextmanager
def _reproduction(context: typer.Context, files: ModelFiles, model: str) -> Iterator[Reproduction]:
    with temporary_folder() as work:
        layers = ",".join(map(str, gateway_layers(files.layers)))
        yield Reproduction(
            read_ledger(),
            run=lambda arguments: _run(context, arguments),
            legacy=_Legacy(files),
            places={"model": model, "work": str(work), "gateways": layers},
        )


class _Legacy:
    """Figures by the scripts' rules; torch and the model are loaded when the first is wanted."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files
        self._figures: LegacyFigures | None = None

    def figure(self, spec: str) -> Any:
        """Return the figure that a spec names."""
        if self._figures is None:
            # Loads torch.
            from quant_fairness_plugin.claims.legacy import LegacyFigures
            from quant_fairness_plugin.model.load import load_model

            self._figures = LegacyFigures(load_model(self._files, device="cpu"))  # in float32, as the scripts did
        return self._figures.figure(spec)


def _run(context: typer.Context, arguments: list[str]) -> str:
    """Run another command of this program and return its stdout.

    Raises:
        QuantFairnessError: what the command raises; a `ConfigError` where its arguments are wrong.
    """
    assert context.parent is not None
    held = io.StringIO()
    try:
        with redirect_stdout(held):
            status = context.parent.command.main(arguments, prog_name="quant-fairness", standalone_mode=False)
    except typer.TyperException as err:
        raise ConfigError(f"{err.format_message()} ({' '.join(arguments)})") from err
    if status:
        raise QuantFairnessError(f"exit status {status}: {' '.join(arguments)}")
    return held.getvalue()


def _list(claims: Sequence[Claim], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(claim) for claim in claims], ensure_ascii=False, indent=1))
        return
    for claim in claims:
        say(f"{claim.id:<8} {claim.here:<10} {claim.says}", indent=20)


def _print(
    files: ModelFiles, findings: Sequence[Finding], seconds: dict[str, float], output: Path | None, *, as_json: bool
) -> None:
    known = {"versions": package_versions(), "model": files.name, "model_sha256": model_sha256(files)}
    document = {"schema_version": 1, "kind": "reproduction", "provenance": known, "seconds": seconds}
    rows = {"findings": [asdict(finding) for finding in findings]}
    text = json.dumps(document | rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    if output is not None:
        write_atomically(output, text.encode())
    if as_json:
        typer.echo(text, nl=False)
        return
    show(table(files.name, findings))


def table(model: str, findings: Sequence[Finding]) -> Table:
    """Return the findings: the scripts' figure, theirs again by their rule, ours."""
    result = Table(title=f"claims on {model}; kl is in bits per byte", show_lines=True, expand=True)
    for name, ratio in (("claim", 5), ("seed", 4), ("legacy", 3), ("rigorous", 7)):
        result.add_column(name, ratio=ratio)
    for row in findings:
        seed = f"{row.seed} ({row.origin})" if row.seed else row.origin
        result.add_row(f"{row.id} {row.says}", seed, row.legacy_text, row.rigorous_text)
    return result
