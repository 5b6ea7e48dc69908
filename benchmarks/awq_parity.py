"""Is our AWQ as good as gptqmodel's? KL to the 16-bit model, ours over theirs, on several calibration draws.

    make .venv-gptqmodel/.installed
    .venv/bin/python benchmarks/awq_parity.py --model demo

As `gptq_parity.py`, whose draws, scoring and verdict it uses: the same float16 weights, the same asymmetric grid, the
same token rows (all of one length), both read back to dense weights from the 16-bit numbers and integers that are
stored, both scored by the same code on text that neither has seen. What AWQ folds into norms and other modules is
stored in 16 bit by both.
Appends one JSON row per draw and one summary row to `--out`.

Refuses to report where gptqmodel used another grid or base model, or where either is worse than rounding.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptq_parity import (
    METHODS,
    ROOT,
    RefusedError,
    Series,
    append,
    calibration_draw,
    context,
    ratio,
    series_of_draw,
    summary_row,
    unpack,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import Grid, ProtectionPlan, TextSet
from quant_fairness_plugin.measure.metrics import significant
from quant_fairness_plugin.model.exchange import stored_form
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.quantize.calibration import CalibrationSet, build_calibration
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.texts.load import load_texts

log = logging.getLogger("awq_parity")

INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring columns is in a word of the `gemm` layout, lowest bits first."""


def run_peer(
    arguments: argparse.Namespace, model: Path, calibration: CalibrationSet, grid: Grid, out: Path
) -> dict[str, Any]:
    """Quantize with gptqmodel in its own process, unless the folder holds the answer to the same request already.

    Returns what gptqmodel says that it used.
    """
    request = {
        "method": "awq",
        "rows": [list(row) for rows in calibration.rows.values() for row in rows],
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
    }
    request_file, asked_before = out.with_suffix(".request.json"), None
    if (out / "peer.json").exists():
        asked_before = json.loads(request_file.read_text(encoding="utf-8"))
    if asked_before != request:
        request_file.write_text(json.dumps(request), encoding="utf-8")
        command = [arguments.peer_python, ROOT / "peers" / "gptqmodel_quantize.py", model, request_file, out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RefusedError(f"gptqmodel failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    peer: dict[str, Any] = json.loads((out / "peer.json").read_text(encoding="utf-8"))
    used = json.loads((out / "quantize_config.json").read_text(encoding="utf-8"))
    asked = {"bits": grid.bits, "group_size": grid.group_size, "zero_point": not grid.symmetric}
    if any(used[name] != value for name, value in asked.items()):
        raise RefusedError(f"gptqmodel used {used}; asked was {asked}")
    return peer | {"reused_folder": asked_before == request}


def equal_rows(tokenizer: PreTrainedTokenizerBase, sample: TextSet, row_tokens: int, seed: int) -> CalibrationSet:
    """As many whole rows as every language has. Of rows of several lengths, gptqmodel would use the last batch only."""
    build = partial(build_calibration, tokenizer, sample, row_tokens=row_tokens, seed=seed)
    whole = min(build().coverage.values()) // row_tokens * row_tokens
    if not whole:
        raise RefusedError(f"a language has less than one row of {row_tokens} tokens: raise --sentences")
    return build(tokens_per_language=whole)


def read_peer(folder: Path, loaded: LoadedModel, grid: Grid) -> dict[str, Tensor]:
    """What gptqmodel's folder stores instead of the model's own weights, as `bank.swapped` takes it.

    Written from the layout alone (zero points as they are, columns interleaved), not from our own reader.
    """
    files: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        files |= load_file(path)
    modules = {name: m for layer in range(loaded.layers) for name, m in loaded.linears(layer).items()}
    dense = changed_parameters(files, loaded)
    for name, module in modules.items():
        levels = columns_in_order(unpack(files[f"{name}.qweight"], grid.bits, axis=1))
        zeros = columns_in_order(unpack(files[f"{name}.qzeros"], grid.bits, axis=1))
        width = len(levels) // len(zeros)
        centred = (levels - zeros.repeat_interleave(width, dim=0)).float()
        weight = centred * files[f"{name}.scales"].float().repeat_interleave(width, dim=0)
        dense[name] = stored_form(module, weight.T)
    return dense


def columns_in_order(interleaved: Tensor) -> Tensor:
    rows, columns = interleaved.shape
    return interleaved.view(rows, columns // 8, 8)[:, :, list(INTERLEAVED)].reshape(rows, columns)


def changed_parameters(files: dict[str, Tensor], loaded: LoadedModel) -> dict[str, Tensor]:
    """The 16-bit parameters that differ from the model's. Only what AWQ folds scales into may."""
    own = dict(loaded.model.named_parameters())
    kept = sorted(own.keys() & files.keys())
    changed = {
        name: files[name].to(own[name]) for name in kept if not torch.equal(files[name].to(own[name]), own[name])
    }
    sources = {fold.source for fold in loaded.family.architecture.folds}
    stray = [name for name in changed if name.rpartition(".")[0].split(".", 3)[-1] not in sources]
    if not kept or stray:
        raise RefusedError(f"gptqmodel's 16-bit weights differ from the model's: {stray or 'none are there'}")
    return changed


def run_draw(
    arguments: argparse.Namespace, loaded: LoadedModel, texts: TextSet, draw: int, folder: Path
) -> tuple[dict[str, Any], Series]:
    """Quantize with both, score, and return the row and the log ratio under every resample."""
    seed, grid = arguments.seed + draw, grid_of(arguments)
    sample = calibration_draw(texts, arguments.sentences, seed)
    calibration = equal_rows(loaded.tokenizer, sample, arguments.row_tokens, seed)
    plan = ProtectionPlan.unprotected(loaded.files.name, loaded.layers, grid)
    started = time.monotonic()
    ours = quantize_model(loaded, plan, method="awq", calibration=calibration)
    seconds = {"ours": time.monotonic() - started}
    started, out = time.monotonic(), folder / f"draw-{draw}"
    peer = run_peer(arguments, loaded.files.folder, calibration, grid, out)
    if not peer["reused_folder"]:
        seconds["gptqmodel"] = time.monotonic() - started
    rounded = quantize_model(loaded, plan, method="rtn")
    states = {
        "ours": ours.dense_weights(),
        "gptqmodel": read_peer(out, loaded, grid),
        "rtn": rounded.dense_weights(),
    }
    if ours.kept:
        raise RefusedError(f"the two quantized different modules; ours left out {sorted(ours.kept)}")
    series, scored = series_of_draw(loaded, texts.part("confirm"), states, arguments.seed)
    estimates = {name: significant(float(series[name][0])) for name in METHODS}
    if max(estimates["ours"], estimates["gptqmodel"]) >= estimates["rtn"]:
        raise RefusedError(f"no better than rounding: {estimates} bits per byte; the calibration text is too small")
    log_ratios = np.log(series["ours"] / series["gptqmodel"])
    row = {
        "benchmark": "awq_parity",
        "draw": draw,
        "ratio": ratio(log_ratios),
        "kl_bits_per_byte": estimates,
        **scored,
        "seconds_including_start": {name: round(value, 1) for name, value in seconds.items()},
        "calibration": calibration.summary(),
        "seed": seed,
        "peer": peer,
    }
    return row, log_ratios


def grid_of(arguments: argparse.Namespace) -> Grid:
    return Grid(bits=arguments.bits, group_size=arguments.group_size, symmetric=False)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--texts", default="bundled")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=60, help="sentences of a calibration draw, per language")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4, choices=(4,))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-python", type=Path, default=ROOT.parent / ".venv-gptqmodel" / "bin" / "python")
    parser.add_argument("--peer-folders", type=Path, help="keep what gptqmodel writes, and use it again on later runs")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "cpu" / "awq_parity.jsonl")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    arguments = parse_arguments(argv)
    loaded, texts = load_model(arguments.model), load_texts(arguments.texts)
    command = ["benchmarks/awq_parity.py", *argv]
    shared = context(loaded, texts, grid=grid_of(arguments), seed=arguments.seed, command=command)
    collected = []
    with nullcontext(arguments.peer_folders) if arguments.peer_folders else tempfile.TemporaryDirectory() as folder:
        for draw in range(arguments.draws):
            row, log_ratios = run_draw(arguments, loaded, texts, draw, Path(folder))
            append(arguments.out, row | shared)
            collected.append(log_ratios)
            log.info("draw %d: %s %s", draw, row["ratio"], row["kl_bits_per_byte"])
    summary = summary_row("awq_parity", collected, arguments.seed)
    append(arguments.out, summary | shared)
    print(json.dumps(summary, indent=1))
    return 0 if summary["parity"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
