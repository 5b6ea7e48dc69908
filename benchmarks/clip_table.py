"""Damage of each language under GPTQ for every clipping rule, without protection, and what fitting the scales costs.

    python benchmarks/clip_table.py measure          # about a quarter of an hour on one core; writes the rows
    python benchmarks/clip_table.py compare demo     # the default rule against absmax on a model, or on its folder
    python benchmarks/clip_table.py render           # rewrites docs/clipping.md

Everything is measured in memory on the `confirm` part of the bundled sentences. All rules share calibration, widths and
bytes; they differ in the scales alone. Gains are over `absmax`, with 95 % bootstrap intervals over sentences.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rows import conditions

from quant_fairness_plugin.artifacts import Grid, package_versions, write_atomically
from quant_fairness_plugin.quantize.grid_rules import CLIPS

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "clip_table.jsonl"
PAGE = ROOT / "docs" / "clipping.md"
MODEL = "demo"
WIDTHS = (4, 3)
SEED = 0
TIMED = 2048
"""Rows and columns of the weight whose scales are timed."""
TIMED_LANGUAGES = 10
COMPARED = ("absmax", "mse")
DEFAULTS = ("demo", "demo-gpt2", "SmolLM2-135M")
"""Models by which the default rule is chosen."""


def measure() -> None:
    import torch

    torch.set_num_threads(1)
    common = {
        "seed": SEED,
        "versions": package_versions(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU, one thread",
        "command": "python benchmarks/clip_table.py measure",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = [common | row for row in time_rules()]
    for bits in WIDTHS:
        rows += [common | row for row in measure_width(bits)]
    write(rows + [row for row in read_rows() if row["kind"] == "default"])


def compare(given: argparse.Namespace) -> None:
    """Measure the rules of `COMPARED` on a model, each in INT4 as `run` makes it, in place of its old rows."""
    import torch

    torch.set_num_threads(1)
    names = ("method", "langs", "sentences")
    options = "".join(f" --{name} {value}" for name in names if (value := getattr(given, name)))
    command = f"python benchmarks/clip_table.py compare {given.model}{options}"
    common = conditions(command=command, seed=SEED)
    new = [common | row for row in measure_default(given)]
    key = (given.model, given.method)
    write([r for r in read_rows() if r["kind"] != "default" or (r["model"], r.get("method", "gptq")) != key] + new)


def measure_default(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per rule, with the gain of the second over the first on the same sentences."""
    from beginnings_table import opened

    base = opened(given)
    states, seconds = quantized_states(base, COMPARED, given.method)
    measured = base.measure(*states)
    for clip in COMPARED:
        result = measured.measurements[clip]
        yield {
            "kind": "default", "model": given.model, "method": given.method, "clip": clip, "part": "confirm",
            "grid": str(replace(base.config.grid, clip=clip)), "sentences": result.languages[0].sentences,
            "start": result.provenance.start, "languages": list(base.texts.languages),
            "quantize_cpu_seconds": seconds[clip],
            "worst_kl": asdict(result.worst_kl), "mean_kl": asdict(result.mean_kl),
            "gain_over_absmax": None if clip == "absmax" else asdict(measured.gain("absmax", clip)),
            "model_sha256": result.provenance.model_sha256, "text_sha256": result.provenance.text_sha256,
        }  # fmt: skip


def quantized_states(base: Any, clips: Sequence[str], method: str) -> tuple[list[Any], dict[str, float]]:
    """The model under a method with each rule, as states to measure, and the CPU seconds of each."""
    from quant_fairness_plugin.artifacts import ProtectionPlan
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.exchange import swapped
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.stream import quantize_model

    calibration = None if method == "rtn" else build_calibration(base.loaded.tokenizer, base.texts)
    states, seconds = [], {}
    for clip in clips:
        plan = ProtectionPlan.unprotected(MODEL, base.loaded.layers, replace(base.config.grid, clip=clip))
        start = time.process_time()
        quantized = quantize_model(base.loaded, plan, method=method, calibration=calibration)
        seconds[clip] = time.process_time() - start
        weights = quantized.dense_weights()
        states.append(ModelState(clip, lambda weights=weights: swapped(base.loaded, weights)))
        sys.stderr.write(f"{clip}: {seconds[clip]:.1f} s\n")
    return states, seconds


def write(rows: list[dict[str, Any]]) -> None:
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def time_rules() -> Iterator[dict[str, Any]]:
    """One row per rule: seconds to fit the scales of one random weight, all in one process, best of three."""
    import torch

    from quant_fairness_plugin.quantize.grid import fit_grid
    from quant_fairness_plugin.quantize.moments import GroupMoments, diagonal_blocks

    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(TIMED, TIMED, generator=generator) * 0.02
    inputs = torch.randn(TIMED_LANGUAGES, 2 * TIMED, TIMED, generator=generator)
    moments = GroupMoments(
        torch.stack([diagonal_blocks(given.T @ given, 128) for given in inputs]), torch.ones(TIMED_LANGUAGES)
    )
    for clip in CLIPS:
        grid = Grid(bits=4, group_size=128, clip=clip)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            fit_grid(weight, grid, scale_dtype=torch.float16, inputs=moments)
            seconds.append(time.process_time() - start)
        yield {"kind": "time", "clip": clip, "grid": str(grid), "rows": TIMED, "columns": TIMED} | {
            "cpu_seconds": min(seconds)
        }
        sys.stderr.write(f"{clip}: {min(seconds):.3f} s\n")


def measure_width(bits: int) -> Iterator[dict[str, Any]]:
    """One row per rule and language, and one per rule for the summary."""
    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.artifacts import ProtectionPlan
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.exchange import swapped
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.stream import quantize_model

    base = FairQuantizer.from_pretrained(MODEL, bits=bits, seed=SEED, protect_layers="none")
    calibration = build_calibration(base.loaded.tokenizer, base.texts)
    states, losses, seconds = [], {}, {}
    for clip in CLIPS:
        grid = replace(base.config.grid, clip=clip)
        plan = ProtectionPlan.unprotected(MODEL, base.loaded.layers, grid)
        start = time.process_time()
        quantized = quantize_model(base.loaded, plan, method="gptq", calibration=calibration)
        seconds[clip] = time.process_time() - start
        losses[clip] = sum(quantized.losses.values()) / len(quantized.losses)
        weights = quantized.dense_weights()
        states.append(ModelState(clip, lambda weights=weights: swapped(base.loaded, weights)))
        sys.stderr.write(f"int{bits} {clip}: {seconds[clip]:.1f} s\n")
    measured = base.measure(*states)
    for clip in CLIPS:
        result = measured.measurements[clip]
        common = {
            "kind": "damage",
            "model": MODEL,
            "bits": bits,
            "group_size": 128,
            "clip": clip,
            "part": "confirm",
        } | {
            "model_sha256": result.provenance.model_sha256,
            "text_sha256": result.provenance.text_sha256,
            "calibration": calibration.summary(),
        }
        for damage in result.languages:
            yield common | asdict(damage)
        summary = {"worst_kl": result.worst_kl, "mean_kl": result.mean_kl, "mean_delta_bpb": result.mean_delta_bpb}
        yield (
            common
            | {"language": "all supported", "output_loss": losses[clip], "quantize_cpu_seconds": seconds[clip]}
            | {name: asdict(value) for name, value in summary.items()}
            | {"gain_over_absmax": None if clip == "absmax" else asdict(measured.gain("absmax", clip))}
        )


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def render() -> None:
    rows = read_rows()
    parts = [PREFACE]
    for bits in WIDTHS:
        parts += [f"## GPTQ INT{bits}, groups of 128, model `{MODEL}`\n", table(rows, bits), verdict(rows, bits)]
    parts += ["## Whether `mse` can be the default\n", defaults(rows), "## Time\n", times(rows)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def table(rows: list[dict[str, Any]], bits: int) -> str:
    """A Markdown table of KL per language and rule, in thousandths of a bit per byte."""
    mine = {(row["clip"], row["language"]): row for row in rows if row["kind"] == "damage" and row["bits"] == bits}
    languages = [language for clip, language in mine if clip == "absmax" and language != "all supported"]
    lines = ["| language | " + " | ".join(CLIPS) + " |", "|" + "---|" * (len(CLIPS) + 1)]
    for language in languages:
        status = mine["absmax", language]["status"]
        name = language if status == "supported" else f"{language} ({status})"
        lines.append(
            f"| {name} | " + " | ".join(figure(mine[clip, language]["kl_bits_per_byte"]) for clip in CLIPS) + " |"
        )
    for label, key in (("worst KL", "worst_kl"), ("mean KL", "mean_kl")):
        cells = [figure(mine[clip, "all supported"][key]) for clip in CLIPS]
        lines.append(f"| **{label}** | " + " | ".join(cells) + " |")
    gains = [mine[clip, "all supported"]["gain_over_absmax"] for clip in CLIPS]
    lines.append("| gain over absmax | " + " | ".join("" if gain is None else figure(gain) for gain in gains) + " |")
    errors = [f"{1000 * mine[clip, 'all supported']['output_loss']:.2f}" for clip in CLIPS]
    lines.append("| GPTQ's own loss (thousandths of the output energy) | " + " | ".join(errors) + " |")
    return "\n".join([*lines, ""])


def defaults(rows: list[dict[str, Any]]) -> str:
    """The two rules on every model that was measured, and whether the second is better on all of them."""
    mine = [row for row in rows if row["kind"] == "default"]
    lines = ["| model | method | grid | worst KL | mean KL | gain over absmax |", "|---|---|---|---|---|---|"]
    for row in mine:
        gain = "" if row["gain_over_absmax"] is None else figure(row["gain_over_absmax"])
        cells = (row["model"], row.get("method", "gptq"), row["grid"], figure(row["worst_kl"]), figure(row["mean_kl"]))
        lines.append(f"| {' | '.join(cells)} | {gain} |")
    return "\n".join([*lines, "", RULE, "", *(default_verdict(mine, method) for method in ("gptq", "rtn")), AWQ, ""])


def default_verdict(rows: list[dict[str, Any]], method: str) -> str:
    """Whether `mse` is a method's default, in a sentence."""
    gains = {
        row["model"]: row["gain_over_absmax"]
        for row in rows
        if row["gain_over_absmax"] and row.get("method", "gptq") == method
    }
    lacking = [model for model in DEFAULTS if model not in gains]
    better = [model for model, gain in gains.items() if gain["low"] > 0]
    worse = [model for model, gain in gains.items() if gain["high"] < 0]
    level = [model for model in gains if model not in better + worse]
    said = f"lower on {', '.join(better) or 'none'}, higher on {', '.join(worse) or 'none'}"
    said += f", not measurably different on {', '.join(level)}" if level else ""
    said += f"; not measured here: {', '.join(lacking)}" if lacking else ""
    return f"- `{method}`: {'the default' if better and not worse else 'not the default'}. KL is {said}."


def verdict(rows: list[dict[str, Any]], bits: int) -> str:
    """What the intervals allow to be said, rule by rule."""
    gains = {
        row["clip"]: row["gain_over_absmax"]
        for row in rows
        if row["kind"] == "damage" and row["bits"] == bits and row["language"] == "all supported"
    }
    better = [clip for clip, gain in gains.items() if gain and gain.get("low", 0) > 0]
    worse = [clip for clip, gain in gains.items() if gain and gain.get("high", 0) < 0]
    rest = [clip for clip, gain in gains.items() if gain and clip not in better + worse]
    sentences = [
        f"Against `absmax`, the KL of the worst language gets lower with {names(better)}, "
        f"higher with {names(worse)}, and does not measurably change with {names(rest)}."
    ]
    if "minimax" in better and "mse" in better:
        ahead = gains["minimax"]["low"] > gains["mse"]["high"]
        sentences.append(f"`minimax` is {'' if ahead else 'not '}measurably ahead of `mse` by these intervals.")
    return " ".join(sentences) + "\n"


def times(rows: list[dict[str, Any]]) -> str:
    mine = [row for row in rows if row["kind"] == "time"]
    base = mine[0]["cpu_seconds"]
    lines = [
        f"CPU seconds to fit the scales of one random {TIMED} x {TIMED} weight ({mine[0]['machine']}; all rules in "
        f"one process, best of three), `minimax` with {TIMED_LANGUAGES} languages; and of the whole GPTQ run:\n",
        "| rule | seconds | times absmax | GPTQ INT4, whole model |",
        "|---|---|---|---|",
    ]
    whole = {row["clip"]: row["quantize_cpu_seconds"] for row in rows if row.get("bits") == 4 and "output_loss" in row}
    lines += [
        f"| {row['clip']} | {row['cpu_seconds']:.3f} | {row['cpu_seconds'] / base:.0f} | {whole[row['clip']]:.1f} |"
        for row in mine
    ]
    return "\n".join([*lines, ""])


def names(clips: list[str]) -> str:
    return ", ".join(f"`{clip}`" for clip in clips) or "none"


def figure(value: dict[str, Any]) -> str:
    if "undefined" in value:
        return "undefined"
    return f"{1000 * value['estimate']:.1f} [{1000 * value['low']:.1f}, {1000 * value['high']:.1f}]"


RULE = (
    "`mse` is a method's default where it measurably lowers the worst language's KL on one of these models and "
    "measurably raises it on none:"
)
AWQ = (
    "- `awq`: not the default. It searches the ranges of its groups itself, by output error, where the rule is "
    "`absmax`.\n"
    "- Other tools (`--backend`) have rules of their own."
)
PREFACE = """# Clipping rules

Written by `benchmarks/clip_table.py`; the rows are in `benchmarks/results/cpu/clip_table.jsonl`. KL is that of the
quantized against the 16-bit model, in thousandths of a bit per byte, with 95 % bootstrap intervals over sentences, on
the `confirm` part of the bundled text set. No layer is protected. There is one calibration draw, which the intervals
say nothing about. Rows without `start` are of an earlier version, calibrated and measured behind the declared BOS.

| rule | range of a group's scale |
|---|---|
| `absmax` | all of the group's values |
| `mse` | shrunk in steps of 1 % to the least squared error |
| `gaussian`, `laplace`, `student-t` | the best range for a distribution of that shape and of the group's width |
| `empirical` | the stored scale of least squared error, among all there are |
| `minimax` | shrunk to the least output error of the language that suffers most |
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "compare", "render"))
    parser.add_argument("model", nargs="?", default=MODEL, choices=DEFAULTS)
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--method", default="gptq", choices=("gptq", "rtn"))
    parser.add_argument("--langs")
    parser.add_argument("--sentences", type=int, help="of the confirm part; all by default")
    given = parser.parse_args()
    if given.what == "measure":
        measure()
    elif given.what == "compare":
        compare(given)
    else:
        render()
