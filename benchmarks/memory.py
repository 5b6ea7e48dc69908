"""Memory and CPU time of whole commands, each in a process of its own, beside their forecast.

    python benchmarks/memory.py --model SmolLM2-135M --label after        # adds two rows
    python benchmarks/memory.py --random wide --layers 4 --label after    # random values in the shape of a 2B Llama
    python benchmarks/memory.py --model demo --langs en,fr --run --label run     # adds one, of `run`
    python benchmarks/memory.py --random deep --layers 156 --limit 1.2GB --sentences 4 --langs en,fr --label limited

`quantize` writes, verifies and measures a checkpoint, with GPTQ unless `--more` says otherwise; `measure` then measures
it again. Before, `plan` forecasts the peaks. Peak memory is the most that the process ever had resident (`VmHWM`:
libraries and mapped files included) and the most that it allocated (`RssAnon`, sampled); seconds are user and system
time of the process, so that what else the machine does hardly matters. `--limit` is enforced by the system
(`RLIMIT_DATA`, as `ulimit -d` and `prlimit --data` set it). The checkpoint is removed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

from commands import ENTRY, one_thread, printed_apart
from rows import conditions

from quant_fairness_plugin.artifacts import Part, write_atomically
from quant_fairness_plugin.model.resolve import resolve_model
from quant_fairness_plugin.model.sizes import parse_size
from quant_fairness_plugin.texts.load import load_texts

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "memory.jsonl"
LANGUAGES = "en,fr,es,ru,ar,zh"
SAMPLE_SECONDS = 0.02
SEED = 0
FORECAST_OPTIONS = ("--effort", "--memory-budget", "--prompts", "--texts", "--bits", "--group-size")
"""Of `quantize`, that `plan` takes as well; it forecasts no other method than GPTQ."""
DEEP = {"WIDTH": 1024, "INNER": 2816, "VOCABULARY": 32_000, "HEADS": 16, "KV_HEADS": 4}
"""Another shape than that of the 2B Llama: many small blocks."""


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.folder) as place:
        model, out = options.model, Path(place) / "out"
        if options.random:
            model = str(Path(place) / "model")
            write_random(Path(model), options.layers, options.random)
        more = ["--langs", options.langs, *options.more.split()]
        if options.sentences is not None:
            more += ["--texts", str(write_texts(Path(place) / "texts.jsonl", options))]
        kept = [each for each in zip(more, more[1:], strict=False) if each[0] in ("--langs", *FORECAST_OPTIONS)]
        known = "--method" not in more
        forecast = forecast_of(model, [word for pair in kept for word in pair]) if known else {}
        commands = {"quantize": [model, "--protect-layers", "none", *more, "--output", str(out)]}
        if options.run:
            commands = {"run": ["--model", model, *more, "--output", str(out)]}
        elif options.measure:
            texts = [word for pair in kept if pair[0] in ("--langs", "--texts", "--memory-budget") for word in pair]
            commands["measure"] = [str(out), "--model", model, *texts]
        for command, arguments in commands.items():
            row = describe(command, options, model) | measure(command, arguments, options)
            row |= (compared(row, forecast[command]) if known else {}) | sizes(model, out)
            keep(row | conditions(command=said(command, arguments, place), seed=SEED), options)


def keep(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a row, and add it to the others."""
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    if not options.no_row:
        lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
        write_atomically(ROWS, (lines + json.dumps(row, ensure_ascii=False) + "\n").encode())


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder or a name that quantize takes")
    parser.add_argument("--random", choices=("wide", "deep"), help="make a random checkpoint of this shape instead")
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoint")
    parser.add_argument("--langs", default=LANGUAGES)
    parser.add_argument("--label", required=True, help="before, after, …")
    parser.add_argument("--more", default="", help="further arguments of quantize, in one string")
    parser.add_argument("--sentences", type=int, help="of each part and language; else all")
    parser.add_argument("--limit", help="most data that a process may have, such as 1.2GB")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="quantize alone")
    parser.add_argument("--run", action="store_true", help="run instead of quantize and measure")
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run")
    parser.add_argument("--no-row", action="store_true", help="print the row, do not keep it")
    return parser.parse_args()


def forecast_of(model: str, arguments: list[str]) -> dict[str, Any]:
    """Return what `plan` says of the memory of every command."""
    said = json.loads(printed_apart("plan", "--model", model, *arguments, "--json"))
    return {each["command"]: each for each in said["commands"]}


def compared(row: dict[str, Any], forecast: dict[str, Any]) -> dict[str, Any]:
    """Return the forecast beside the peak."""
    stage = max(forecast["stages"], key=lambda stage: int(stage["bytes_"]))
    expected = forecast["libraries"] + stage["bytes_"]
    return {
        "forecast_bytes": expected,
        "forecast_stage": stage["name"],
        "peak_over_forecast": round(row["vm_hwm_bytes"] / expected, 3),
    }


def measure(command: str, arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run a command in a new process, and return what that process took."""
    limit = None if options.limit is None else parse_size(options.limit)
    bounded = None if limit is None else partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    peak = {"RssAnon": 0, "VmHWM": 0, "VmData": 0}
    given = [sys.executable, "-c", ENTRY, command, *arguments]
    with subprocess.Popen(given, env=one_thread(), stdout=subprocess.DEVNULL, preexec_fn=bounded) as process:
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{command} failed ({process.returncode})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "limit_data_bytes": limit,
        "vm_hwm_bytes": peak["VmHWM"],
        "rss_anon_bytes": peak["RssAnon"],
        "vm_data_bytes": peak["VmData"],
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(time.monotonic() - started, 1),
    }


def sizes(model: str, out: Path) -> dict[str, Any]:
    """Return the bytes of both checkpoints, and the checksums of the one that was written."""
    return {
        "weights_bytes": sum(path.stat().st_size for path in resolve_model(model).weights),
        "checkpoint_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "checkpoint_sha256": json.loads((out / "quant_fairness.json").read_text())["files"],
    }


def describe(command: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return which row it is."""
    shape = f"random Llama, {options.layers} layers" + (" (deep)" if options.random == "deep" else "")
    return {"label": options.label, "of": command, "model": shape if options.random else Path(model).name}


def said(command: str, arguments: list[str], place: str) -> str:
    """Return a command without the folders of this machine."""
    names = (Path(word).name if word.startswith(place) or Path(word).is_absolute() else word for word in arguments)
    return " ".join(["quant-fairness", command, *names])


def memory_of(process: int) -> dict[str, int]:
    """Return bytes of a process by kind; nothing where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    found = re.findall(r"(RssAnon|VmHWM|VmData):\s+([0-9]+) kB", status)
    return {name: 1024 * int(kib) for name, kib in found}


def write_texts(path: Path, options: argparse.Namespace) -> Path:
    """Write the first sentences of every part of the bundled texts to a file, and return it."""
    texts = load_texts("bundled", languages=options.langs.split(","), reference=None)
    some = {part: texts.part(part).take(range(options.sentences)).sentences for part in get_args(Part)}
    rows = [
        {"id": f"{part}-{number}", "part": part} | {name: held[name][number] for name in held}
        for part, held in some.items()
        for number in range(options.sentences)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_random(folder: Path, layers: int, shape: str) -> None:
    """Write a checkpoint of random values, shard by shard, in a process of its own."""
    folder.mkdir()
    code = (
        "import sys, json, sweep_memory; from pathlib import Path; vars(sweep_memory).update(json.loads(sys.argv[3])); "
        "sweep_memory.write_checkpoint(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    given = [str(folder), str(layers), json.dumps(DEEP if shape == "deep" else {})]
    subprocess.run([sys.executable, "-c", code, *given], cwd=Path(__file__).parent, check=True)
    if not any(folder.glob("*.safetensors")):
        shutil.rmtree(folder)
        sys.exit("no checkpoint was written")


if __name__ == "__main__":
    main()
