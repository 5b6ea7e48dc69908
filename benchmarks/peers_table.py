"""Our checkpoints beside those of other tools: the same model, calibration rows and evaluation text.

    make real peers                           # once: the model, and an environment for each tool
    python benchmarks/peers_table.py make SmolLM2-135M     # a process a variant, minutes each; goes on where it stopped
    python benchmarks/peers_table.py measure SmolLM2-135M  # one pass over all, some minutes; writes the rows
    python benchmarks/peers_table.py render                # writes the tables of docs/peers.md

A variant is one tool with one calibration; all get the same token rows. `make` leaves a folder of each under `--work`,
with what it cost, and makes no variant twice; `measure` reads the named ones and ours with our own dequantizer, in
float32, and scores them on the `confirm` sentences, which no calibration saw; rows of others stay. Differences between
two checkpoints are paired, sentence by sentence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pages import write_tables
from peers_page import front, tables
from peers_variants import (
    ENVIRONMENTS,
    LANGUAGES,
    MODELS,
    OURS,
    ROOT,
    SEED,
    TOKENS,
    VARIANTS,
    Calibration,
    Variant,
    possible,
)
from rows import conditions

from quant_fairness_plugin.artifacts import Part, Start, TextSet, write_atomically

if TYPE_CHECKING:
    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.measure.scoring import ModelState

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "peers_table.jsonl"
PAGE = ROOT / "docs" / "peers.md"
BEGINNINGS: tuple[Start, ...] = ("plain", "bos", "chat")
"""Where a tokenizer has them and they are not the usual one, the first half of the sentences is measured so, too."""


def calibration_texts(calibration: Calibration) -> TextSet:
    """Return the text set whose `calibrate` part a calibration takes.

    English takes the `search` part too, so that it has more than the few rows of one language. Sentences of that part
    choose our plan, and none of it is measured on.
    """
    from quant_fairness_plugin.texts.load import load_texts

    # By another name: those that come with the library bring documents, and no other tool's rows are from these.
    texts = replace(load_texts("bundled", languages=LANGUAGES), name="bundled sentences")
    if calibration != "English":
        return texts
    parts: tuple[Part, ...] = tuple("calibrate" if part == "search" else part for part in texts.parts)
    return replace(texts, parts=parts)


def request(model: str, variant: Variant) -> dict[str, Any]:
    """Return what a peer's script is told: token rows, the same rows as text, the grid, and its own settings."""
    from transformers import AutoTokenizer

    from quant_fairness_plugin.model.resolve import resolve_model
    from quant_fairness_plugin.quantize.calibration import build_calibration

    asked = {"method": "gptq", "bits": 4, "group_size": 64, "symmetric": True, "damp": 0.01, "order": "default"}
    asked |= {"calibration": variant.calibration, "rows": [], "texts": []} | variant.settings
    if variant.calibration == "none":
        return asked
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model).folder, local_files_only=True)
    made = build_calibration(
        tokenizer, calibration_texts(variant.calibration), tokens_per_language=TOKENS[variant.calibration], seed=SEED,
        weighting="english" if variant.calibration == "English" else "uniform",
    )  # fmt: skip
    rows = [list(row) for language in made.rows.values() for row in language]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return asked | {"rows": rows, "texts": texts, "tokens_sha256": made.sha256, "tokens": sum(map(len, rows))}


def sixteen_bit_gguf(model: str, path: Path) -> Path:
    """Return a model as a GGUF file of 16 bit, written where it is not there yet.

    Metadata and tokenizer are those of the file that the model came in. llama.cpp's own converter, given the folder
    that was made of it, takes the tokenizer for one of another kind.
    """
    from quant_fairness_plugin.export.gguf import write_gguf
    from quant_fairness_plugin.model.resolve import resolve_model

    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import shipped_file

    if not path.is_file():
        write_gguf(resolve_model(model).folder, shipped_file(), path, embedding="16bit")
    return path


def make(model: str, work: Path, names: list[str]) -> None:
    """Make the checkpoints that are not there yet, one process each; a tool that fails leaves its reason."""
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not note(work, name).is_file():
            made = run(model, work, name)
            write_atomically(note(work, name), (json.dumps(made, indent=1, ensure_ascii=False) + "\n").encode())
            sys.stderr.write(f"{name}: {made.get('failed') or made['cpu_seconds']}\n")


def run(model: str, work: Path, name: str) -> dict[str, Any]:
    """Run a variant's script; return what it took."""
    from quant_fairness_plugin.model.resolve import resolve_model

    variant, out = VARIANTS[name], work / slug(name)
    request_file = work / f"{slug(name)}.request.json"
    # In a process of its own: the most memory that a process has had is passed on to those that it starts.
    ask = (sys.executable, __file__, "ask", work.name, "--folder", model, "--variants", name)
    if subprocess.run([*ask, "--to", request_file, "--work", work.parent], check=False).returncode:
        return {"failed": "its request cannot be made: see above", "request": {}}
    asked = json.loads(request_file.read_text(encoding="utf-8"))
    home = ENVIRONMENTS.get(variant.tool)
    python = Path(sys.executable) if home is None else ROOT / home / "bin" / "python"
    script = ROOT / "benchmarks" / "peers" / f"{variant.tool}_quantize.py"
    if not python.exists():
        raise SystemExit(f"{python} is missing: make peers")
    made_at = conditions(command="", seed=SEED)["revision"]
    # One thread: waiting threads of a busy machine would count as CPU time.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with (work / f"{slug(name)}.log").open("wb") as log:
        started = time.monotonic()
        command = list(map(str, (python, script, resolve_model(model).folder, request_file, out)))
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    told = {key: value for key, value in asked.items() if key not in ("rows", "texts", "full")}
    if process.returncode != 0:
        return {"failed": f"status {process.returncode}", "request": told}
    peer = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    peer["tool_versions"] = peer.pop("versions")
    if peer.pop("calibrated", asked.get("tokens_sha256")) != asked.get("tokens_sha256"):
        raise SystemExit(f"{name}: calibrated on other rows than those that all get")
    return {
        "request": told,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(time.monotonic() - started, 1),
        "peak_rss_bytes": 1024 * used.ru_maxrss,
        "weight_bytes": sum(path.stat().st_size for path in weight_files(out)),
        "made_at": made_at,
    } | peer


def bytes_of(model: str, work: Path, name: str) -> int:
    """Return the bytes of a variant's weights: as it was made here, else as its row says.

    Raises:
        SystemExit: it was not made, and has no row.
    """
    made = [json.loads(note(work, name).read_text(encoding="utf-8"))] if note(work, name).is_file() else []
    stored = [row for row in read_rows() if (row["model"], row["variant"]) == (model, name)]
    found = [row["weight_bytes"] for row in (*made, *stored) if "failed" not in row]
    if not found:
        raise SystemExit(f"{name!r} gives the number of bytes: make it first")
    return int(found[0])


def note(work: Path, name: str) -> Path:
    """Return the file that says what making a variant took."""
    return work / f"{slug(name)}.json"


def slug(name: str) -> str:
    """Return the name of a variant's folder."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])


def checkpoint_of(folder: Path) -> Path:
    """Return what is read: a GGUF file, or the folder."""
    return next(iter(folder.glob("*.gguf")), folder)


def measure(name: str, model: str, work: Path, names: list[str], *, sentences: int | None = None) -> None:
    """Measure our checkpoint and the named ones that were made, and put their rows in place of their old ones.

    Args:
        name: of the model.
        model: its bundled name or folder.
        work: where its checkpoints are.
        names: of variants.
        sentences: how many of each language; all of the part where None.
    """
    if not note(work, OURS).is_file():
        raise SystemExit(f"{OURS!r} is what the others are compared with: make it first")
    asked = dict.fromkeys((OURS, *names))  # ours as well: what the others are compared with is what stands in its row
    made = {each: json.loads(done.read_text("utf-8")) for each in asked if (done := note(work, each)).is_file()}
    failed = [each for each, row in made.items() if "failed" in row]
    found = damage(model, work, [each for each in made if each not in failed], sentences)
    option = "" if sentences is None else f" --sentences {sentences}"
    common = conditions(command=f"python benchmarks/peers_table.py measure {name}{option}", seed=SEED)
    new = [
        {"variant": each, "model": name, "tool": VARIANTS[each].tool, "calibration": VARIANTS[each].calibration}
        | ({} if each in failed else found[each])
        | common
        | row
        for each, row in made.items()
    ]
    kept = [row for row in read_rows() if (row["model"], row["variant"]) not in {(name, each) for each in made}]
    compared = [row for row in (*new, *kept) if row["model"] == name and "failed" not in row]
    check_alike(compared)
    ours = next(row for row in compared if row["variant"] == OURS)
    for row in compared:  # also those that stay: ours may be another than the one that they were compared with
        compare(ours, row)
        for start, behind_it in row["beginnings"].items():
            compare(ours["beginnings"][start], behind_it)
    rows = sorted([*new, *kept], key=place)
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def check_alike(rows: list[dict[str, Any]]) -> None:
    """Refuse to put rows into one table that were measured on different things."""
    if len({tuple(row.get(key) for key in ("model_sha256", "text_sha256", "sentences")) for row in rows}) > 1:
        raise SystemExit("rows that stay are of another model, text or number of sentences: measure all again")


def damage(model: str, work: Path, names: list[str], sentences: int | None) -> dict[str, dict[str, Any]]:
    """Return the figures of each checkpoint: as the model is usually used, and behind other beginnings."""
    import torch

    from quant_fairness_plugin.checkpoint.others import readable_folder
    from quant_fairness_plugin.config import FairConfig
    from quant_fairness_plugin.fair_quantizer import FairQuantizer
    from quant_fairness_plugin.model.beginnings import all_beginnings
    from quant_fairness_plugin.preflight import ModelSource
    from quant_fairness_plugin.quantize.workplace import Workplace
    from quant_fairness_plugin.steps import exported_state

    torch.set_num_threads(1)
    config = FairConfig(languages=LANGUAGES, seed=SEED)
    quantizer = FairQuantizer.from_source(
        ModelSource(model), config, stream=True, place=Workplace(folder=work / "sixteen-bit")
    )
    folders = {name: readable_folder(checkpoint_of(work / slug(name))) for name in names}
    states = [exported_state(folder, quantizer.loaded, name=name) for name, folder in folders.items()]
    texts = some(quantizer.texts, sentences)
    others = [start for start in list(all_beginnings(quantizer.loaded.tokenizer))[1:] if start in BEGINNINGS]
    found = behind(quantizer, states, texts)
    half = texts.take(range(len(texts) // 2))
    behind_others = {start: behind(quantizer, states, replace(half, start=start)) for start in others}
    return {
        name: found[name] | {"beginnings": {start: those[name] for start, those in behind_others.items()}}
        for name in names
    }


def behind(quantizer: FairQuantizer, states: list[ModelState], texts: TextSet) -> dict[str, dict[str, Any]]:
    """Return the figures of each state on texts that say what stands before them."""
    quantizer.texts = texts
    measured = quantizer.measure(*states)
    return {state.name: figures(measured, state.name) for state in states}


def some(texts: TextSet, sentences: int | None) -> TextSet:
    """Return a text set with so many sentences of its confirm part, evenly spread, or all of them."""
    confirm = [place for place, part in enumerate(texts.parts) if part == "confirm"]
    count = sentences or len(confirm)
    return texts.take([confirm[number * len(confirm) // count] for number in range(count)])


def place(row: dict[str, Any]) -> tuple[int, int]:
    """Return where a row stands."""
    return list(MODELS).index(row["model"]), list(VARIANTS).index(row["variant"])


def figures(measured: Any, name: str) -> dict[str, Any]:
    """Return the damage of a checkpoint, and the KL of every sentence, from which pairs are compared."""
    result, scores = measured.measurements[name], measured.scores[name].languages
    return {
        "kl": {row.language: asdict(row.kl_bits_per_byte) | {"status": row.status} for row in result.languages},
        "delta_bpb": {row.language: asdict(row.delta_bpb) for row in result.languages},
        "worst_kl": asdict(result.worst_kl),
        "mean_kl": asdict(result.mean_kl),
        "by_sentence": {
            language: {"kl_nats": list(found.kl_nats), "bytes": list(found.bytes_)}
            for language, found in scores.items()
        },
        "part": result.part,
        "sentences": result.languages[0].sentences,
        "model_sha256": result.provenance.model_sha256,
        "text_sha256": result.provenance.text_sha256,
    }


def compare(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """Set what a checkpoint loses beyond ours; nothing where its row, of an earlier time, has no sentences."""
    other.pop("beyond_ours", None)
    if "by_sentence" in other:
        other["beyond_ours"] = beyond(ours, other)


def beyond(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint loses beyond ours: worst, mean and every language, bits per byte, sentences paired.

    Only languages that both support count.
    """
    import numpy as np

    from quant_fairness_plugin.measure.intervals import Resamples, interval

    languages = [
        name for name in ours["kl"] if ours["kl"][name]["status"] == other["kl"][name]["status"] == "supported"
    ]

    def draws(row: dict[str, Any]) -> Any:
        resamples = Resamples(row["sentences"], seed=SEED)
        by_language = [
            resamples.ratio(*(np.array(row["by_sentence"][name][key], float) for key in ("kl_nats", "bytes")))
            for name in languages
        ]
        return np.stack(by_language) / math.log(2)

    before, after = draws(ours), draws(other)
    found = {"worst": after.max(0) - before.max(0), "mean": after.mean(0) - before.mean(0)}
    found |= dict(zip(languages, after - before, strict=True))
    return {name: asdict(interval(series)) for name, series in found.items()}


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []


def render() -> None:
    """Write the tables into their page, and the first one of the README."""
    rows = read_rows()
    for model in MODELS:
        write_tables(PAGE, tables([row for row in rows if row["model"] == model], possible(model)))
    write_tables(ROOT / "README.md", first_table())


def first_table() -> dict[str, str]:
    """Return the table of the README by name."""
    return front([row for row in read_rows() if row["model"] == "SmolLM2-135M"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("make", "measure", "render", "ask"))
    parser.add_argument("model", nargs="?", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--sentences", type=int, help="of the confirm part to measure on; all by default")
    parser.add_argument("--to", type=Path, help="where ask, of which make makes use, writes what a script is told")
    parser.add_argument("--folder", help="where the model lies, unless it is where make real puts it")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "peers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="by default all that the model can have")
    given = parser.parse_args()
    model, work = given.folder or MODELS[given.model], given.work / given.model
    names = given.variants or possible(given.model)
    if given.what == "make":
        make(model, work, names)
    elif given.what == "measure":
        measure(given.model, model, work, names, sentences=given.sentences)
    elif given.what == "ask":
        variant = VARIANTS[names[0]]
        asked = request(model, variant)
        if "within" in asked:
            asked["max_bytes"] = bytes_of(given.model, work, asked["within"])
        if variant.tool == "llamacpp" or "gguf" in variant.settings:
            asked["full"] = str(sixteen_bit_gguf(model, work / "sixteen-bit.gguf"))
        given.to.write_text(json.dumps(asked), encoding="utf-8")
    else:
        render()


if __name__ == "__main__":
    main()
