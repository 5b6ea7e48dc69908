"""Memory and CPU time of whole commands: `quantize` and `measure`, each in a process of its own.

    python benchmarks/memory.py --model SmolLM2-135M --label after       # adds a row
    python benchmarks/memory.py --random --layers 4 --label after        # random values in the shape of a 2B Llama

`quantize` quantizes by GPTQ, writes, verifies and measures a checkpoint. Peak memory is the most that the process ever
had resident (`VmHWM`: libraries and mapped files included) and the most that it allocated (`RssAnon`, sampled); seconds
are user and system time of the process, so that what else the machine does hardly matters. The checkpoint is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "memory.jsonl"
ENTRY = "from quant_fairness_plugin.cli.main import main; main()"
LANGUAGES = "en,fr,es,ru,ar,zh"
SAMPLE_SECONDS = 0.02
SEED = 0


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.folder) as place:
        folder = Path(place)
        model = options.model
        if options.random:
            model = str(folder / "model")
            write_random(Path(model), options.layers)
        row = describe(options) | measure(model, folder / "out", options)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    if not options.no_row:
        lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
        write_atomically(ROWS, (lines + json.dumps(row, ensure_ascii=False) + "\n").encode())


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder or a name that quantize takes")
    parser.add_argument("--random", action="store_true", help="make a random checkpoint instead")
    parser.add_argument("--layers", type=int, default=4, help="of the random checkpoint")
    parser.add_argument("--langs", default=LANGUAGES)
    parser.add_argument("--label", required=True, help="before, after, …")
    parser.add_argument("--more", default="", help="further arguments of quantize, in one string")
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run")
    parser.add_argument("--no-row", action="store_true", help="print the row, do not keep it")
    return parser.parse_args()


def measure(model: str, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a new process, and return what that process took."""
    given = ["quantize", model, "--protect-layers", "none", "--langs", options.langs, *options.more.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    peak = {"RssAnon": 0, "VmHWM": 0}
    command = [sys.executable, "-c", ENTRY, *given, "--output", str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"quantize failed ({process.returncode})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "vm_hwm_bytes": peak["VmHWM"],
        "rss_anon_bytes": peak["RssAnon"],
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(time.monotonic() - started, 1),
        "weights_bytes": sum(path.stat().st_size for path in Path(model).glob("*.safetensors")),
        "checkpoint_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "checkpoint_sha256": json.loads((out / "quant_fairness.json").read_text())["files"],
    } | conditions(command=" ".join(["quant-fairness", *given[:1], Path(model).name, *given[2:]]), seed=SEED)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return which row it is."""
    return {
        "label": options.label,
        "model": f"random Llama, {options.layers} layers" if options.random else Path(options.model).name,
    }


def memory_of(process: int) -> dict[str, int]:
    """Return bytes of a process by kind; nothing where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    return {name: 1024 * int(kib) for name, kib in re.findall(r"(RssAnon|VmHWM):\s+([0-9]+) kB", status)}


def write_random(folder: Path, layers: int) -> None:
    """Write a checkpoint of random values in the shape of a 2B Llama, shard by shard, in a process of its own."""
    folder.mkdir()
    code = (
        "import sys, sweep_memory; from pathlib import Path; "
        "sweep_memory.write_checkpoint(Path(sys.argv[1]), int(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(layers)], cwd=Path(__file__).parent, check=True)
    if not any(folder.glob("*.safetensors")):
        shutil.rmtree(folder)
        sys.exit("no checkpoint was written")


if __name__ == "__main__":
    main()
