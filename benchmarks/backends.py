"""Other tools behind our commands: what we add to their time, and what each of them makes of the same calibration.

    make .venv-gptqmodel/.installed
    .venv-gptqmodel/bin/python benchmarks/backends.py overhead --backend gptqmodel
    .venv-gptqmodel/bin/python benchmarks/backends.py quality --model demo

`overhead` quantizes a random Llama of 12 layers (`--width` wide) through `FairQuantizer` with two layers protected, and
splits the time by our own timers: the tool (loading, quantizing and saving by its own calls), verifying, and all the
rest, which is what we add: loading the model for ourselves, building the calibration rows, reading the tool's files,
comparing, writing the checkpoint. The overhead is the rest over the tool; measuring is left out, and importing the
libraries is done before. Wall-clock and CPU seconds; on a shared machine only ratios within one run mean much.

`quality` compares our GPTQ with each tool's GPTQ, as they are used (each with its own defaults), on the same token
rows and grid: mean KL per byte to the 16-bit model on text that none has seen, ours over theirs, and the seconds of
each. A *draw* is a random sample of sentences to calibrate on. Appends a JSON row per draw and backend and a summary
row per backend to `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from gptq_parity import append, calibration_draw, context, holds, ratio, series_of_draw, summary_ratio
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan, package_versions
from quant_fairness_plugin.export import foreign, writer
from quant_fairness_plugin.export.foreign import quantize_with
from quant_fairness_plugin.fair_quantizer import FairQuantizer
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.resolve import bundled_folder
from quant_fairness_plugin.quantize.backends import Backend, backend_versions, find_backend
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.texts.load import load_texts

log = logging.getLogger("backends")

ROOT = Path(__file__).resolve().parent
BACKENDS = ("gptqmodel", "llmcompressor")
LAYERS, PROTECTED = 12, (0, 1)
ALLOWED_OVERHEAD = 0.05
T = TypeVar("T")


class Timers:
    """Wall-clock and CPU seconds by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        wall, cpu = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.monotonic() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu

    def around(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def timed(*args: Any, **kwargs: Any) -> T:
            with self.running(name):
                return function(*args, **kwargs)

        return timed


def write_model(folder: Path, width: int) -> int:
    """A random Llama with the demo model's tokenizer; returns how many parameters it has."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("demo"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 128 * 128,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def overhead(arguments: argparse.Namespace, command: Sequence[str]) -> None:
    timers = Timers()
    with tempfile.TemporaryDirectory() as work:
        parameters = write_model(Path(work) / "model", arguments.width)
        import_module(arguments.backend)
        with timed_parts(timers), timers.running("all"):
            quantizer = FairQuantizer.from_pretrained(
                f"{work}/model",
                method=arguments.method,
                backend=arguments.backend,
                group_size=arguments.group_size,
                protect_layers=PROTECTED,
                tokens_per_language=arguments.tokens,
                seed=arguments.seed,
            )
            record = quantizer.save_pretrained(f"{work}/out", measure=None)
    rest = {name: seconds["all"] - seconds["tool"] - seconds["verify"] for name, seconds in vars(timers).items()}
    shares = {name: rest[name] / seconds["tool"] for name, seconds in vars(timers).items()}
    row = {
        "benchmark": "backends_overhead",
        "backend": arguments.backend,
        "method": arguments.method,
        "parameters": parameters,
        "layers": LAYERS,
        "protected": PROTECTED,
        "group_size": arguments.group_size,
        "calibration_tokens": sum(record.calibration["tokens_per_language"].values()),
        "wall_seconds": rounded(timers.wall | {"ours": rest["wall"]}),
        "cpu_seconds": rounded(timers.cpu | {"ours": rest["cpu"]}),
        "overhead_wall": round(shares["wall"], 4),
        "overhead_cpu": round(shares["cpu"], 4),
        "allowed": ALLOWED_OVERHEAD,
        "seed": arguments.seed,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": record.provenance.versions,
        "command": shlex.join(["python", *command]),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    append(arguments.out, row)
    print(json.dumps(row, indent=1))


@contextmanager
def timed_parts(timers: Timers) -> Iterator[None]:
    """Time the tool's own calls and the verification wherever the line of ours makes them."""
    verify, find = writer.verify, foreign.find_backend

    def timed_backend(name: str) -> Backend:
        backend = find(name)
        backend.quantize = timers.around("tool", backend.quantize)  # type: ignore[method-assign]
        return backend

    writer.verify, foreign.find_backend = timers.around("verify", verify), timed_backend
    try:
        yield
    finally:
        writer.verify, foreign.find_backend = verify, find


def quality(arguments: argparse.Namespace, command: Sequence[str]) -> None:
    loaded, texts = load_model(arguments.model), load_texts("bundled")
    grid = Grid(group_size=arguments.group_size)
    shared = context(loaded, texts, grid=grid, seed=arguments.seed, command=command)
    plan = ProtectionPlan.unprotected(loaded.files.name, loaded.layers, grid)
    plain = quantize_model(loaded, plan, method="rtn").dense_weights()
    collected: dict[str, list[Any]] = {name: [] for name in BACKENDS}
    for draw in range(arguments.draws):
        seed = arguments.seed + draw
        sample = calibration_draw(texts, arguments.sentences, seed)
        calibration = build_calibration(loaded.tokenizer, sample, seed=seed)
        made, timers = quantize_by_all(loaded, plan, calibration)
        states = {name: quantized.dense_weights() for name, quantized in made.items()} | {"rtn": plain}
        series, scored = series_of_draw(loaded, texts.part("confirm"), states, arguments.seed)
        for name in BACKENDS:
            log_ratios = np.log(series["ours"] / series[name])
            collected[name].append(log_ratios)
            row = {
                "benchmark": "backends_quality",
                "backend": name,
                "draw": draw,
                "ratio": ratio(log_ratios),
                "kl_bits_per_byte": {state: significant(float(series[state][0])) for state in ("ours", name, "rtn")},
                "kl_bits_per_byte_by_language": scored["kl_bits_per_byte_by_language"],
                "wall_seconds": rounded({state: timers.wall[state] for state in ("ours", name)}),
                "cpu_seconds": rounded({state: timers.cpu[state] for state in ("ours", name)}),
                "calibration": calibration.summary(),
                "seed": seed,
                "backend_versions": backend_versions(find_backend(name)),
            }
            append(arguments.out, row | shared)
            log.info("draw %d %s: %s %s", draw, name, row["ratio"], row["wall_seconds"])
    for name, log_ratios in collected.items():
        found = summary_ratio(np.stack(log_ratios), arguments.seed)
        summary = {
            "benchmark": "backends_quality",
            "backend": name,
            "draw": "summary",
            "draws": arguments.draws,
            "ratio": found,
            "ratio_of_each_draw": [round(float(np.exp(one[0])), 5) for one in log_ratios],
            "parity": holds(found),
            "note": "geometric mean over draws of the ratio of mean KL per byte; draws and sentences resampled",
        }
        append(arguments.out, summary | shared)
        print(json.dumps(summary, indent=1))


def quantize_by_all(
    loaded: LoadedModel, plan: ProtectionPlan, calibration: CalibrationSet
) -> tuple[dict[str, QuantizedModel], Timers]:
    """The whole model by our core and by every backend, each timed with its loading and reading back."""
    timers = Timers()
    made: dict[str, QuantizedModel] = {}
    with timers.running("ours"):
        made["ours"] = quantize_model(loaded, plan, method="gptq", calibration=calibration)
    for name in BACKENDS:
        import_module(name)
        with timers.running(name):
            made[name] = quantize_with(name, loaded, plan, method="gptq", calibration=calibration)
    return made, timers


def rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items()}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("overhead", "quality"))
    parser.add_argument("--backend", choices=BACKENDS, default="gptqmodel", help="of `overhead`")
    parser.add_argument("--method", choices=("gptq", "awq"), default="gptq", help="of `overhead`")
    parser.add_argument("--width", type=int, default=640, help="of the random model; 640 makes 63M parameters")
    parser.add_argument("--tokens", type=int, default=512, help="of `overhead`, per language")
    parser.add_argument("--model", default="demo", help="of `quality`")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=60, help="sentences of a calibration draw, per language")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "backends.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    torch.set_num_threads(1)
    arguments = parse_arguments(argv)
    command = ["benchmarks/backends.py", *argv]
    log.info("%s", package_versions())
    (overhead if arguments.what == "overhead" else quality)(arguments, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
