"""Which causal architectures of the installed Transformers are quantized here, and what becomes of the others.

    make coverage                                         # all of them, some minutes; rows and docs/architectures.md
    python benchmarks/architectures.py --only phi3 lfm2   # these rows anew, beside the stored ones

Of every architecture a tiny model with random weights is made, written as a checkpoint, and taken through the code that
a user's model goes through: opened, swept with every unit protected once, scored by gradients, quantized with GPTQ and
layer 1 in 16 bit, exported in every format, and read back by Transformers, whose logits must be those of our own
dequantizer. A row says how far it came, or the reason of the refusal. That something is quantized and read right is
what a row shows; how much quality a trained model of the architecture keeps, it does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import conditions
from tiny_architectures import SEED, write_tiny

if TYPE_CHECKING:
    from quant_fairness_plugin.artifacts import TextSet
    from quant_fairness_plugin.model.load import LoadedModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "architectures.jsonl"
GROUP = 32
FORMATS = ("compressed-tensors", "gptq", "awq", "fp16-twin")
READ_HERE = ("compressed-tensors", "fp16-twin")
"""Formats that Transformers reads without gptqmodel."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one architecture came to."""

    model_type: str
    units: str = ""
    swept: bool = False
    scored: bool = False
    """Every unit by gradients, as `auto` does; with the model read block by block, too, to the same figures."""
    quantized: bool = False
    formats: tuple[str, ...] = ()
    """Written and checked tensor by tensor."""
    read: tuple[str, ...] = ()
    """Read back by Transformers, with equal logits."""
    folds: str = ""
    reason: str = ""
    """Why it is refused, or where it stops; empty where it came all the way."""

    @property
    def member(self) -> bool:
        """Whether it came all the way in the default format."""
        return self.quantized and "compressed-tensors" in self.read


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="these model types; the other rows stay as they are stored")
    options = parser.parse_args()
    rows = stored_rows() if options.only else {}
    command = f"python benchmarks/architectures.py --only {' '.join(options.only)}" if options.only else "make coverage"
    for model_type in options.only or model_types():
        row = cover(model_type)
        sys.stderr.write(f"{row_text(row)}\n")
        rows[model_type] = asdict(row) | conditions(command=command, seed=SEED)
    store(rows)


def stored_rows() -> dict[str, dict[str, Any]]:
    """The rows that there are, by architecture."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {row["model_type"]: row for row in rows}


def store(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows, and the page that shows them."""
    from quant_fairness_plugin.artifacts import write_atomically

    lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in sorted(rows)]
    write_atomically(ROWS, "".join(lines).encode())
    render()


def render() -> None:
    """Write the page from the rows."""
    from quant_fairness_plugin.artifacts import write_atomically

    write_atomically(PAGE, page(stored_rows()).encode())


def model_types() -> list[str]:
    """Every causal architecture of the installed Transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cover(model_type: str) -> Row:
    """Take a tiny model of an architecture as far as it goes."""
    from quant_fairness_plugin.errors import QuantFairnessError

    with tempfile.TemporaryDirectory(prefix="coverage-") as work, _quiet():
        folder = Path(work) / "model"
        refused = _refusal(model_type)
        if refused:
            return Row(model_type, reason=refused)
        problem = write_tiny(model_type, folder)
        if problem:
            return Row(model_type, reason=problem)
        try:
            return _walk(model_type, folder, Path(work))
        except QuantFairnessError as err:
            return Row(model_type, reason=_one_line(err, folder))
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here
            return Row(model_type, reason=f"fails: {type(err).__name__}: {_one_line(err, folder)}")


def _refusal(model_type: str) -> str:
    """The reason of a refusal by the config alone, before a model is made of it."""
    from transformers import AutoConfig

    from quant_fairness_plugin.model.architectures.refused import refusal_of

    try:
        config = AutoConfig.for_model(model_type).to_dict()
    except Exception:  # noqa: BLE001 - some configs have no defaults
        config = {}
    return (refusal_of(model_type, config) or "").split("; expected")[0]


def _one_line(err: BaseException, folder: Path) -> str:
    return " ".join(str(err).split()).replace(f"{folder}/", "").replace(str(folder), "it")[:220].strip()


def _texts() -> TextSet:
    from quant_fairness_plugin.artifacts import TextSet

    return TextSet(
        name="three words",
        sentences={"en": ("one", "two", "three"), "he": ("אחת", "שתיים", "שלוש")},
        ids=("a", "b", "c"),
        parts=("all",) * 3,
        registers=("everyday",) * 3,
        parallel=True,
        sha256="0" * 64,
    )


def _walk(model_type: str, folder: Path, work: Path) -> Row:
    from quant_fairness_plugin.model.load import load_model
    from quant_fairness_plugin.model.outline import outline_model
    from quant_fairness_plugin.model.resolve import resolve_model

    files = resolve_model(str(folder))
    loaded = load_model(files)
    if outline_model(files).family != loaded.family:
        return Row(model_type, units=_units(loaded), reason="fails: plan and quantize see different units")
    row: dict[str, Any] = {"units": _units(loaded), "folds": _folds(loaded)}
    stops = ""
    try:
        _sweep(loaded)
        row["swept"] = True
    except Exception as err:  # noqa: BLE001 - a plan can be given without a sweep
        stops = f"sweep: {_one_line(err, folder)}"
    try:
        _score(loaded, folder)
        row["scored"] = True
    except Exception as err:  # noqa: BLE001 - a plan can be given without scores
        stops = stops or f"score: {_one_line(err, folder)}"
    try:
        quantized = _quantize(loaded)
        row["quantized"] = True
    except Exception as err:  # noqa: BLE001 - the row says where it stops
        return Row(model_type, **row, reason=f"{stops} quantize: {_one_line(err, folder)}".strip())
    formats, read, reason = _export(quantized, folder, work)
    return Row(model_type, **row, formats=formats, read=read, reason=stops or reason)


def _units(loaded: LoadedModel) -> str:
    """The units of every kind of layer, in forward order."""
    family = loaded.family
    kinds = dict.fromkeys(
        ", ".join(unit.name for unit in family.units_of(layer)) + ("; 16 bit: " if family.kept(layer) else "")
        + ", ".join(name.split(".")[-1] for name in family.kept(layer))
        for layer in range(loaded.layers)
    )  # fmt: skip
    return " / ".join(kinds) + (" (not traced)" if family.generic else "")


def _folds(loaded: LoadedModel) -> str:
    from quant_fairness_plugin.errors import UnsupportedModelError
    from quant_fairness_plugin.quantize.folding import model_folds

    try:
        kinds = dict.fromkeys(", ".join(model_folds(loaded, layer)) for layer in range(loaded.layers))
    except UnsupportedModelError:
        return ""
    return " / ".join(kind or "none" for kind in kinds)


def _sweep(loaded: LoadedModel) -> None:
    from quant_fairness_plugin.artifacts import Grid, Precision
    from quant_fairness_plugin.plans.units import map_units
    from quant_fairness_plugin.sweep.bank import RtnBank
    from quant_fairness_plugin.sweep.walk import score_plans

    units = map_units(loaded)
    everything: dict[str, Precision] = dict.fromkeys(units.group_names(), "int4")
    plans = {name: {k: v for k, v in everything.items() if k != name} for name in everything}
    scores = score_plans(loaded, plans, _texts(), units=units, bank=RtnBank(loaded, units, Grid(group_size=GROUP)))
    if set(scores) < set(plans):
        raise ValueError("plans without scores")


def _score(loaded: LoadedModel, folder: Path) -> None:
    from quant_fairness_plugin.model.streamed import open_streamed

    scores, in_blocks = (_scores(each) for each in (loaded, open_streamed(str(folder))))
    if not scores or scores != in_blocks:
        raise ValueError("read block by block, it has other scores" if scores else "no scores")


def _scores(loaded: LoadedModel) -> Any:
    from quant_fairness_plugin.artifacts import Grid
    from quant_fairness_plugin.planning import check_scorable
    from quant_fairness_plugin.plans.units import map_units
    from quant_fairness_plugin.sweep.bank import RtnBank
    from quant_fairness_plugin.sweep.fisher import Changes, score_sentences

    check_scorable(loaded)
    units = map_units(loaded)
    bank = RtnBank(loaded, units, Grid(group_size=GROUP), keep=False)
    return score_sentences(loaded, _texts(), Changes.of(loaded, units, bank, ("int4",)))[0]


def _quantize(loaded: LoadedModel) -> Any:
    from quant_fairness_plugin.artifacts import Grid
    from quant_fairness_plugin.plans.costs import count_bytes
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.stream import quantize_model
    from quant_fairness_plugin.recommend import explicit_plan

    grid = Grid(group_size=GROUP)
    layer_bytes, other = count_bytes(loaded, grid)
    plan = explicit_plan((1,), model=loaded.files.name, grid=grid, layer_bytes=layer_bytes, other_bytes=other)
    calibration = build_calibration(loaded.tokenizer, _texts(), row_tokens=8)
    return quantize_model(loaded, plan, method="gptq", calibration=calibration)


def _export(quantized: Any, folder: Path, work: Path) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return the formats that are written, those that Transformers reads here, and what is wrong with the default."""
    from quant_fairness_plugin.export.writer import export

    written, read, reason = [], [], ""
    for form in FORMATS:
        try:
            export(quantized, work / form, texts=_texts(), format=form)  # type: ignore[arg-type] # one of the formats
        except Exception as err:  # noqa: BLE001 - the row says where it stops
            reason = reason or f"{form}: {_one_line(err, folder)}"
            continue
        written.append(form)
        if form in READ_HERE:
            read.append(form)  # `export` ran Transformers on it and compared the logits
    return tuple(written), tuple(read), reason


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# The page


def row_text(row: Row) -> str:
    """A line of one of the two tables."""
    if not row.units:
        return f"| {row.model_type} | {row.reason} |"
    cells = (
        row.model_type,
        row.units,
        "yes" if row.swept else "no",
        "yes" if row.scored else "no",
        "yes" if row.quantized else "no",
        ", ".join(row.formats) or "none",
        ", ".join(row.read) or "none",
        row.folds or "none",
        row.reason,
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def page(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole of docs/architectures.md, from the stored rows."""
    rows = [Row(**{field.name: row[field.name] for field in fields(Row)}) for _, row in sorted(stored.items())]
    versions = next(iter(stored.values()))["versions"]
    members = [row for row in rows if row.member]
    stopped = [row for row in rows if row.units and not row.member]
    refused = [row for row in rows if not row.units]
    header = (
        "architecture",
        "units of a layer",
        "swept",
        "scored",
        "quantized",
        "written",
        "read back",
        "AWQ folds",
        "stops at",
    )
    return "\n".join(
        [
            "# Architectures",
            "",
            "<!-- Written by `make coverage` (benchmarks/architectures.py); do not edit. -->",
            "",
            f"Every causal architecture of Transformers {versions['transformers']} "
            f"(torch {versions['torch'].split('+')[0]}): {len(members)} of {len(rows)} come all the way, "
            f"{len(stopped)} stop on it, {len(refused)} are refused before anything is quantized.",
            "A row is a tiny model with random weights: opened, swept with every unit protected once, scored by "
            "gradients as `auto` does (read block by block as well, with the same figures), quantized with "
            f"GPTQ (INT4, groups of {GROUP}) and layer 1 in 16 bit, written in each format. *Read back*: Transformers "
            "loads it and computes the logits of our own dequantizer; gptq and awq need gptqmodel for that, and are "
            "only checked tensor by tensor ([readers.md](readers.md) has them read). *AWQ folds*: units whose input "
            "scale was proved to fold away. Kinds of layers are parted by `/`. What a trained model keeps of its "
            "quality is not measured here.",
            "",
            "## All the way",
            "",
            *_table(header, members),
            "",
            "## Not all the way",
            "",
            *_table(header, stopped),
            "",
            "## Refused",
            "",
            *_table(("architecture", "reason"), refused),
            "",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Row]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [row_text(row) for row in rows]


if __name__ == "__main__":
    main()
