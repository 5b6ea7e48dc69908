"""Memory of a layer-by-layer sweep: a checkpoint of 2 billion random values, swept under a memory budget.

    python benchmarks/sweep_memory.py                            # some minutes, 4.1 GB of disk; adds a row
    python benchmarks/sweep_memory.py --layers 4 --no-row        # a quick look

The float16 checkpoint has the shape of a Llama (width 2048, vocabulary 128,256, untied) in shards of five layers, and
is removed at the end. The sweep runs in a process of its own, of which this one reads /proc/PID/status all the time:
`RssAnon` is what it allocated, `VmHWM` the most that it ever had resident, libraries and mapped files included.
Required: RssAnon <= 1.5 GB and VmHWM <= 2 GB. It is the sweep of `quant-fairness sweep --memory-budget`, called below
the check that the model knows a language at all, which random weights do not.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quant_fairness_plugin.artifacts import Precision, package_versions, write_atomically
from quant_fairness_plugin.model.resolve import bundled_folder
from quant_fairness_plugin.model.sizes import parse_size, shown

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "sweep_memory.jsonl"
WIDTH, INNER, VOCABULARY, HEADS, KV_HEADS = 2048, 8192, 128_256, 32, 8
SHARD_LAYERS = 5
SEED = 0
MOST_ANONYMOUS, MOST_RESIDENT = 1_500_000_000, 2_000_000_000
SAMPLE_SECONDS = 0.01
SPARE_BYTES = 2 << 30
"""Left free on the disk."""
LANGUAGES = ("en", "fi")


def main() -> None:
    options = parse_options()
    if options.child is not None:
        return sweep(options)
    needed = 2 * (options.layers * layer_values() + 2 * VOCABULARY * WIDTH)
    with tempfile.TemporaryDirectory(prefix="sweep-memory-") as folder:
        if (free := shutil.disk_usage(folder).free) < needed + SPARE_BYTES:
            sys.exit(f"{folder}: {shown(free)} free, {shown(needed + SPARE_BYTES)} needed")
        shards = write_checkpoint(Path(folder), options.layers)
        row = measure(Path(folder), options) | {"parameters": needed // 2, "shards": shards}
    sys.stdout.write(json.dumps(row, indent=1) + "\n")
    if not options.no_row:
        lines = ROWS.read_text(encoding="utf-8") if ROWS.exists() else ""
        write_atomically(ROWS, (lines + json.dumps(row, ensure_ascii=False) + "\n").encode())
    if row["rss_anon_bytes"] > MOST_ANONYMOUS or row["vm_hwm_bytes"] > MOST_RESIDENT:
        sys.exit("more memory than is allowed")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--sentences", type=int, default=2, help="of each of two languages")
    parser.add_argument("--memory-budget", default="950MB")
    parser.add_argument("--no-row", action="store_true", help="print the row, do not keep it")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Sweep in a new process, and what that process took."""
    given = [
        f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("layers", "sentences", "memory_budget")
    ]
    command = [sys.executable, __file__, f"--child={folder}", *given]
    started, peak = time.monotonic(), {"RssAnon": 0, "VmHWM": 0, "RssFile": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for name, value in memory_of(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        sys.exit(f"the sweep failed ({process.returncode})")
    found = json.loads(printed)
    return found | {
        "rss_anon_bytes": peak["RssAnon"],
        "rss_file_bytes": peak["RssFile"],
        "vm_hwm_bytes": max(peak["VmHWM"], found.pop("vm_hwm_bytes")),
        "process_seconds": round(time.monotonic() - started, 1),
        "layers": options.layers,
        "memory_budget": options.memory_budget,
        "seed": SEED,
        "versions": package_versions(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, one thread",
        "command": f"python benchmarks/sweep_memory.py {' '.join(given)}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def memory_of(process: int | str) -> dict[str, int]:
    """Bytes of a process by kind; empty where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    return {name: 1024 * int(kib) for name, kib in re.findall(r"(RssAnon|RssFile|VmHWM):\s+([0-9]+) kB", status)}


def sweep(options: argparse.Namespace) -> None:
    """All protect-one plans and the plan without protection; prints what was done."""
    import torch

    from quant_fairness_plugin.artifacts import Grid
    from quant_fairness_plugin.model.streamed import open_streamed
    from quant_fairness_plugin.plans.units import map_units
    from quant_fairness_plugin.sweep.bank import RtnBank
    from quant_fairness_plugin.sweep.execution import Execution
    from quant_fairness_plugin.sweep.streaming import score_plans_layerwise
    from quant_fairness_plugin.texts.load import load_texts

    torch.set_num_threads(1)
    started = time.monotonic()
    base = memory_of("self")
    loaded = open_streamed(str(options.child))
    opened = time.monotonic() - started
    texts = load_texts("bundled", languages=LANGUAGES, reference="en").part("search").take(range(options.sentences))
    units = map_units(loaded)
    everything: dict[str, Precision] = {f"layers.{layer}": "int4" for layer in range(options.layers)}
    plans = {"none": everything}
    plans |= {layer: {k: v for k, v in everything.items() if k != layer} for layer in everything}
    done: list[tuple[int, int]] = [(0, 0)]
    scores = score_plans_layerwise(
        loaded, plans, texts, units=units, bank=RtnBank(loaded, units, Grid(), keep=False),
        execution=Execution(memory_budget=parse_size(options.memory_budget)),
        progress=lambda *step: done.append(step),
    )  # fmt: skip
    result = {
        "plans": len(plans),
        "tokens": sum(sum(found.tokens) for found in scores["none"].languages.values()),
        "block_passes": done[-1][0],
        "open_seconds": round(opened, 1),
        "sweep_seconds": round(time.monotonic() - started - opened, 1),
        "rss_anon_after_imports_bytes": base["RssAnon"],
        "rss_file_after_imports_bytes": base["RssFile"],
        "vm_hwm_bytes": memory_of("self")["VmHWM"],
    }
    sys.stdout.write(json.dumps(result))


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write the model shard by shard; returns how many."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(SEED)
    groups = [range(start, min(start + SHARD_LAYERS, layers)) for start in range(0, layers, SHARD_LAYERS)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        shapes = dict(shard_shapes(group, first=number == 1, last=number == len(groups)))
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({name: values(shape, generator) for name, shape in shapes.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=False, dtype="float16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    for path in bundled_folder("demo").glob("tokenizer*"):
        shutil.copy(path, folder)
    return len(groups)


def shard_shapes(layers: range, *, first: bool, last: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    if first:
        yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for layer in layers:
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in layer_shapes().items())
    if last:
        yield "model.norm.weight", (WIDTH,)
        yield "lm_head.weight", (VOCABULARY, WIDTH)


def layer_shapes() -> dict[str, tuple[int, ...]]:
    narrow = WIDTH // HEADS * KV_HEADS
    return {
        "input_layernorm": (WIDTH,),
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (narrow, WIDTH),
        "self_attn.v_proj": (narrow, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }


def layer_values() -> int:
    return sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in layer_shapes().values())


def values(shape: tuple[int, ...], generator: Any) -> Any:
    """Random weights of the usual size; norms multiply by one."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return torch.randn(shape, generator=generator).mul_(0.02).half()


if __name__ == "__main__":
    main()
