"""Is our GPTQ as good as gptqmodel's? KL to the 16-bit model, ours over theirs, on several calibration draws.

    make .venv-gptqmodel/.installed
    .venv/bin/python benchmarks/gptq_parity.py --model demo

Both quantize the same float16 weights onto the same grid with the same damping and the same token rows; gptqmodel runs
in its own environment (`--peer-python`). Both results are read back to dense float32 weights from 16-bit scales and
integers, and scored by the same code on text that neither has seen. A *draw* is a random sample of sentences to
calibrate on. Appends one JSON row per draw and one summary row to `--out`.

`--order default` leaves gptqmodel its own column order (group-aware, each group's grid fitted when its turn comes);
`--order static` gives it ours (by Hessian diagonal over all groups, grids fixed before). The first compares the two
tools as they are used; the second only the arithmetic, which should give the same integers but for rounding.

Verdict: parity holds where the ratio of the mean KL per byte is at most 1.02, or its 95 % interval contains 1.
Refuses to report where gptqmodel used another grid, damping or base model, or where either is worse than rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Grid,
    Part,
    ProtectionPlan,
    StateScores,
    TextSet,
    package_versions,
    write_atomically,
)
from quant_fairness_plugin.measure.damage import measure_damage, objective_draws, supported_languages
from quant_fairness_plugin.measure.intervals import Resamples
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.measure.scoring import ModelState, score_states
from quant_fairness_plugin.model.exchange import stored_form, swapped
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.resolve import model_sha256
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from quant_fairness_plugin.quantize.quantized import QuantizedModel
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.texts.load import load_texts

log = logging.getLogger("gptq_parity")

ROOT = Path(__file__).resolve().parent
TOLERATED_RATIO = 1.02
BOOTSTRAP_DRAWS = 2000
METHODS = ("ours", "gptqmodel", "rtn")

Weights = Mapping[str, Tensor]
Series = NDArray[np.float64]


class RefusedError(SystemExit):
    """The comparison would not be one of like with like."""


def calibration_draw(texts: TextSet, sentences: int, seed: int) -> TextSet:
    """A random sample of the sentences outside the part `confirm`, all of them marked for calibration."""
    pool = [i for i, part in enumerate(texts.parts) if part != "confirm"]
    if len(pool) < sentences:
        raise RefusedError(f"{len(pool)} sentences outside 'confirm', fewer than {sentences}: lower --sentences")
    picked = set(random.Random(seed).sample(pool, sentences))
    parts: tuple[Part, ...] = tuple("calibrate" if i in picked else "search" for i in range(len(texts)))
    return replace(texts, parts=parts).part("calibrate")


def run_peer(
    arguments: argparse.Namespace, model: Path, calibration: CalibrationSet, grid: Grid, out: Path
) -> dict[str, Any]:
    """Quantize with gptqmodel in its own process; returns what it says that it used."""
    damp, static = arguments.damp, arguments.order == "static"
    request = {
        "method": "gptq",
        "rows": [list(row) for rows in calibration.rows.values() for row in rows],
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "damp": damp,
        "order": arguments.order,
    }
    request_file = out.with_suffix(".request.json")
    request_file.write_text(json.dumps(request), encoding="utf-8")
    command = [arguments.peer_python, ROOT / "peers" / "gptqmodel_quantize.py", model, request_file, out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"gptqmodel failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    peer: dict[str, Any] = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    used = json.loads((out / "quantize_config.json").read_text(encoding="utf-8"))
    asked = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric, "desc_act": static}
    solved = {"damp_percent": damp, "static_groups": static, "act_group_aware": not static, "mse": 0.0}
    if any(used[k] != v for k, v in asked.items()) or any(peer["settings"][k] != v for k, v in solved.items()):
        raise RefusedError(f"gptqmodel used {used} and {peer['settings']}; asked were {asked} and {solved}")
    return peer


def read_peer(folder: Path, loaded: LoadedModel, grid: Grid) -> dict[str, Tensor]:
    """The weights in gptqmodel's folder as the modules store them, from the integers and scales in its files.

    Written from the layout alone (v1: zero points are stored minus one), not from our own reader.
    """
    files: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        files |= load_file(path)
    modules = {name: m for layer in range(loaded.layers) for name, m in loaded.linears(layer).items()}
    check_kept(files, loaded)
    dense = {}
    for name, module in modules.items():
        levels = unpack(files[f"{name}.qweight"], grid.bits, axis=0)
        zeros = unpack(files[f"{name}.qzeros"], grid.bits, axis=1) + 1
        group = files[f"{name}.g_idx"].long()
        if not torch.equal(group, torch.arange(len(group)) // (len(group) // len(zeros))):
            raise RefusedError(f"{name}: gptqmodel permuted the groups; ours does not")
        weight = (levels - zeros[group]).float() * files[f"{name}.scales"].float()[group]
        dense[name] = stored_form(module, weight.T)
    return dense


def agreement(ours: QuantizedModel, theirs: Weights) -> dict[str, float]:
    """Share of weights whose value is exactly the same in both, in the first layer's first fusion group and in all.

    Only that group (q, k, v) sees the same inputs in both; further on, a weight rounded otherwise changes the inputs.
    """
    own, family = ours.dense_weights(), ours.loaded.family
    same = {name: float((weight == theirs[name]).double().mean()) for name, weight in own.items()}
    first = [same[f"{family.blocks}.0.{name}"] for name in family.units[0].modules]
    return {"first_unit": round(sum(first) / len(first), 4), "all": round(sum(same.values()) / len(same), 4)}


def unpack(packed: Tensor, bits: int, axis: int) -> Tensor:
    """The integers of int32 words, lowest bits first, along an axis of a matrix."""
    words = packed.movedim(axis, -1).long()
    fields = [(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    return torch.stack(fields, dim=-1).flatten(-2).movedim(-1, axis)


def check_kept(files: Weights, loaded: LoadedModel) -> None:
    """What is not quantized must be the same 16-bit numbers, or gptqmodel started from another model."""
    own = dict(loaded.model.named_parameters())
    kept = sorted(own.keys() & files.keys())
    changed = [name for name in kept if not torch.equal(files[name].to(own[name]), own[name])]
    if not kept or changed:
        raise RefusedError(f"gptqmodel's unquantized weights differ from the model's: {changed or 'none are there'}")


def series_of_draw(
    loaded: LoadedModel, held_out: TextSet, states: Mapping[str, Weights], seed: int
) -> tuple[dict[str, Series], dict[str, Any]]:
    """Mean KL in bits per byte of each state under the same resamples (the estimate first), and what was scored."""

    def state(name: str, weights: Weights | None) -> ModelState:
        return ModelState(name, partial(swapped, loaded, weights or {}))

    listed = [state("fp16", None), *(state(name, weights) for name, weights in states.items())]
    scores = score_states(listed, loaded.tokenizer, held_out)
    damage = measure_damage(
        scores["fp16"],
        scores["rtn"],
        held_out,
        vocabulary=loaded.model.config.vocab_size,
        bootstrap=Bootstrap(None, seed=seed),
    )
    languages = supported_languages(damage)
    weights = Resamples(len(held_out), BOOTSTRAP_DRAWS, seed).weights
    series = {
        name: objective_draws(
            scores["fp16"], scores[name], languages, objective="mean", reference=None, weights=weights
        )
        for name in states
    }
    per_language = {
        name: {language: estimate(scores["fp16"], scores[name], language) for language in languages} for name in states
    }
    left_out = {row.language: row.reason for row in damage if row.status != "supported"}
    return series, {"kl_bits_per_byte_by_language": per_language, "languages_left_out": left_out}


def estimate(baseline: StateScores, state: StateScores, language: str) -> float:
    """KL in bits per byte of one language, every sentence once."""
    once = np.ones((1, len(baseline.languages[language].kl_nats)))
    value = objective_draws(baseline, state, [language], objective="mean", reference=None, weights=once)[0]
    return significant(float(value))


def ratio(log_ratios: Series) -> dict[str, float]:
    """Estimate and 95 % percentile interval of exp(log ratio), the estimate first."""
    low, high = np.quantile(log_ratios[1:], (0.025, 0.975))
    values = np.exp([log_ratios[0], low, high])
    return {name: round(float(value), 5) for name, value in zip(("estimate", "low", "high"), values, strict=True)}


def summary_ratio(log_ratios: Series, seed: int) -> dict[str, float]:
    """The geometric mean over draws `[draws, 1 + resamples]`, with draws and sentences both resampled."""
    draws, columns = log_ratios.shape
    picked = np.random.default_rng(seed).integers(0, draws, size=(columns - 1, draws))
    resampled = log_ratios[picked, np.arange(1, columns)[:, None]].mean(axis=1)
    return ratio(np.concatenate([[log_ratios[:, 0].mean()], resampled]))


def holds(found: Mapping[str, float]) -> bool:
    return found["estimate"] <= TOLERATED_RATIO or found["low"] <= 1.0 <= found["high"]


def summary_row(benchmark: str, draws: Sequence[Series], seed: int, **said: str) -> dict[str, Any]:
    """Return the last row: the ratio over all draws, and whether parity holds."""
    found = summary_ratio(np.stack(draws), seed)
    return {
        "benchmark": benchmark,
        **said,
        "draw": "summary",
        "draws": len(draws),
        "ratio": found,
        "ratio_of_each_draw": [round(float(np.exp(series[0])), 5) for series in draws],
        "tolerated_ratio": TOLERATED_RATIO,
        "parity": holds(found),
        "note": "geometric mean over draws of the ratio of mean KL per byte; draws and sentences resampled",
    }


def run_draw(
    arguments: argparse.Namespace, loaded: LoadedModel, texts: TextSet, draw: int, folder: Path
) -> tuple[dict[str, Any], Series]:
    """Quantize with both, score, and return the row and the log ratio under every resample."""
    seed, grid = arguments.seed + draw, Grid(bits=arguments.bits, group_size=arguments.group_size)
    sample = calibration_draw(texts, arguments.sentences, seed)
    calibration = build_calibration(loaded.tokenizer, sample, row_tokens=arguments.row_tokens, seed=seed)
    plan = ProtectionPlan.unprotected(loaded.files.name, loaded.layers, grid)
    started = time.monotonic()
    ours = quantize_model(loaded, plan, method=Gptq(damp=arguments.damp), calibration=calibration)
    seconds = {"ours": time.monotonic() - started}
    started, out = time.monotonic(), folder / f"draw-{draw}"
    peer = run_peer(arguments, loaded.files.folder, calibration, grid, out)
    seconds["gptqmodel"] = time.monotonic() - started
    theirs = read_peer(out, loaded, grid)
    rounded = quantize_model(loaded, plan, method="rtn")
    states = {"ours": ours.dense_weights(), "gptqmodel": theirs, "rtn": rounded.dense_weights()}
    if states["ours"].keys() != theirs.keys() or ours.kept:
        raise RefusedError(f"the two quantized different modules; ours left out {sorted(ours.kept)}")
    series, scored = series_of_draw(loaded, texts.part("confirm"), states, arguments.seed)
    estimates = {name: significant(float(series[name][0])) for name in METHODS}
    if max(estimates["ours"], estimates["gptqmodel"]) >= estimates["rtn"]:
        raise RefusedError(f"no better than rounding: {estimates} bits per byte; the calibration text is too small")
    log_ratios = np.log(series["ours"] / series["gptqmodel"])
    row = {
        "benchmark": "gptq_parity",
        "order": arguments.order,
        "draw": draw,
        "ratio": ratio(log_ratios),
        "kl_bits_per_byte": estimates,
        **scored,
        "same_integers": agreement(ours, theirs),
        "damping_raised": {name: damp for name, damp in ours.damping.items() if damp != arguments.damp},
        "seconds_including_start": {name: round(value, 1) for name, value in seconds.items()},
        "calibration": calibration.summary(),
        "seed": seed,
        "peer": peer,
    }
    return row, log_ratios


def context(loaded: LoadedModel, texts: TextSet, *, grid: Grid, seed: int, command: Sequence[str]) -> dict[str, Any]:
    """What every row carries besides its numbers."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "model": Path(loaded.files.name).name,
        "model_sha256": model_sha256(loaded.files),
        "grid": asdict(grid),
        "scale_dtype": str(loaded.storage_dtype),
        "texts": {
            "name": texts.name,
            "sha256": texts.sha256,
            "scored": "confirm",
            "sentences": len(texts.part("confirm")),
        },
        "bootstrap": {"resamples": BOOTSTRAP_DRAWS, "seed": seed, "unit": "sentence"},
        "machine": {"cpu": models[0].split(":")[1].strip() if models else platform.machine(), "threads": 1},
        "versions": package_versions(),
        "command": shlex.join(["python", *command]),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    before = path.read_bytes() if path.exists() else b""
    write_atomically(path, before + json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", default="bundled")
    parser.add_argument("--order", choices=("default", "static"), default="default", help="gptqmodel's column order")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=60, help="sentences of a calibration draw, per language")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damp", type=float, default=0.05, help="gptqmodel's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", type=Path, default=ROOT.parent / ".venv-gptqmodel" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "gptq_parity.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    arguments = parse_arguments(argv)
    loaded, texts = load_model(arguments.model), load_texts(arguments.texts)
    grid = Grid(bits=arguments.bits, group_size=arguments.group_size)
    command = ["benchmarks/gptq_parity.py", *argv]
    shared = context(loaded, texts, grid=grid, seed=arguments.seed, command=command) | {"damp": arguments.damp}
    collected = []
    with tempfile.TemporaryDirectory() as folder:
        for draw in range(arguments.draws):
            row, log_ratios = run_draw(arguments, loaded, texts, draw, Path(folder))
            append(arguments.out, row | shared)
            collected.append(log_ratios)
            log.info("draw %d: %s %s", draw, row["ratio"], row["kl_bits_per_byte"])
    summary = summary_row("gptq_parity", collected, arguments.seed, order=arguments.order)
    append(arguments.out, summary | shared)
    print(json.dumps(summary, indent=1))
    return 0 if summary["parity"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
