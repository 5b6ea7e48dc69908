"""How much faster the state tree sweeps than the loop it replaces, with equal losses, in one process on the same work.

    python benchmarks/sweep.py speed      # random GPT-2 shapes: 12 x 768 and 32 x 512; --rounding mse: a dearer one
    python benchmarks/sweep.py pairs      # all 66 pairs of 12 layers: time of a block pass against protect-one's
    python benchmarks/sweep.py bfloat16   # does bfloat16 rank the layers of the bundled models as float32 does?
    python benchmarks/sweep.py render     # the table of docs/sweep.md

The loop is the seeds' `layer_sweep`: for every plan it restores the state dict, quantizes everything again and runs one
sentence after another. Both use the same rounding: `tensor` is the seeds' (one scale per tensor), which costs next to
nothing; `absmax` and `mse` are this package's grids of 128. `products` is the time that the matrix products of the tree
alone take on this machine, as measured in the same run: no exact sweep of these plans can be faster.

Rows go to `benchmarks/results/cpu/sweep.jsonl`; those of the same benchmark, shape, rounding and dtype are replaced.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pages import write_tables
from scipy.stats import kendalltau
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from quant_fairness_plugin.artifacts import (
    Bootstrap,
    Grid,
    Precision,
    StateScores,
    TextSet,
    package_versions,
    write_atomically,
)
from quant_fairness_plugin.model.load import LoadedModel, from_loaded, load_model
from quant_fairness_plugin.plans.plan_set import combined_plans, single_plans
from quant_fairness_plugin.plans.units import UnitMap, map_units
from quant_fairness_plugin.sweep.bank import RtnBank
from quant_fairness_plugin.sweep.engine import sweep_units
from quant_fairness_plugin.sweep.walk import plan_tree, score_plans
from quant_fairness_plugin.texts.load import load_texts

ROWS = Path(__file__).parent / "results" / "cpu" / "sweep.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "sweep.md"
SHAPES = {"12x768": (12, 768), "32x512": (32, 512)}
VOCABULARY, SENTENCES, TOKENS = 50257, 16, 32
ROUNDINGS = ("tensor", "absmax", "mse")
LARGEST_DIFFERENCE = 1e-5
"""Nats a token, between the two: float32 sums in another order."""
BOS = "<s>"
RANKED_GRID = Grid(bits=3)
Plans = dict[str, dict[str, Precision]]


class TensorBank(RtnBank):
    """The seeds' rounding: one scale for a whole tensor."""

    def _round(self, name: str, grid: Grid) -> Tensor:
        return round_tensor(self._loaded.model.get_parameter(name).detach())


def round_tensor(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / 7
    return (weight / scale).round().clamp(-7, 7) * scale


def make_bank(loaded: LoadedModel, units: UnitMap, rounding: str) -> RtnBank:
    if rounding == "tensor":
        return TensorBank(loaded, units, Grid())
    return RtnBank(loaded, units, Grid(clip="mse" if rounding == "mse" else "absmax"))


def measure_speed(shape: str, rounding: str, repeats: int) -> list[dict[str, Any]]:
    """One row per dtype of the tree; the loop is always in float32."""
    loaded, texts = random_model(*SHAPES[shape])
    units = map_units(loaded)
    plans = plans_of(units, 1)
    looped, expected = timed(lambda: loop(loaded, plans, units, texts, rounding), repeats)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded.model.to(dtype)  # type: ignore[arg-type] # Transformers types `to` as if it were a method of the class
        walked, scores = timed(lambda: walk(loaded, plans, units, texts, rounding), repeats)
        found = {name: nats_per_token(scores[name]) for name in plans}
        difference = max(abs(a - b) for name in plans for a, b in zip(found[name], expected[name], strict=True))
        if dtype == torch.float32 and difference > LARGEST_DIFFERENCE:
            raise SystemExit(f"the losses differ by {difference:.2e} nats a token; nothing is kept")
        floor, _ = timed(lambda dtype=dtype: products(plan_tree(plans, units).block_passes, *SHAPES[shape], dtype), 1)
        name = str(dtype).removeprefix("torch.")
        times = f"loop {looped:.1f} s, tree {walked:.1f} s, products {floor:.1f} s"
        report(f"{looped / walked:.1f}x  {shape}, {rounding}, {name}: {times}")
        rows.append(
            row(
                "speed",
                shape=shape,
                rounding=rounding,
                dtype=name,
                ratio=round(looped / walked, 2),
                loop_seconds=round(looped, 2),
                tree_seconds=round(walked, 2),
                floor_seconds=round(floor, 2),
                largest_difference_nats=difference,
                block_passes=plan_tree(plans, units).block_passes,
            )
        )
    return rows


def measure_pairs(repeats: int) -> list[dict[str, Any]]:
    """Seconds of a block pass with all pairs, over those with single layers only."""
    loaded, texts = random_model(*SHAPES["12x768"])
    units = map_units(loaded)
    seconds, passes = {}, {}
    for size in (1, 2):
        plans = plans_of(units, size)
        seconds[size], _ = timed(lambda plans=plans: walk(loaded, plans, units, texts, "tensor"), repeats)
        passes[size] = plan_tree(plans, units).block_passes
    ratio = (seconds[2] / passes[2]) / (seconds[1] / passes[1])
    report(f"{ratio:.2f}x a block pass: {passes[2]} passes in {seconds[2]:.1f} s, {passes[1]} in {seconds[1]:.1f} s")
    return [row("pairs", shape="12x768", dtype="float32", ratio=round(ratio, 3), passes=passes, seconds=seconds)]


def measure_bfloat16(model: str) -> list[dict[str, Any]]:
    """Kendall's τ between the layers ranked in float32 and in bfloat16, by KL."""
    texts = load_texts("bundled").part("search")
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        swept = sweep_units(load_model(model, dtype=dtype), texts, grid=RANKED_GRID, bootstrap=Bootstrap(draws=100))
        single = [row for row in swept.rows if len(row.units) == 1]
        values[dtype] = {
            name: [row.objectives[name].estimate for row in single]  # type: ignore[union-attr] # both are defined
            for name in ("worst", "mean")
        }
    rows = []
    for name in ("worst", "mean"):
        tau = float(kendalltau(values[torch.float32][name], values[torch.bfloat16][name]).statistic)
        report(f"τ = {tau:.3f}  {model}, {RANKED_GRID}, by {name} KL")
        rows.append(
            row("bfloat16", model=model, grid=str(RANKED_GRID), objective=name, kendall_tau=round(tau, 4), values=[
                values[torch.float32][name], values[torch.bfloat16][name]])
        )  # fmt: skip
    return rows


def random_model(layers: int, width: int) -> tuple[LoadedModel, TextSet]:
    """A GPT-2 of random weights, and random sentences of as many tokens each (one of them BOS)."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=VOCABULARY)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    words = Tokenizer(models.WordLevel({BOS: 0} | {f"w{i}": i for i in range(1, VOCABULARY)}, unk_token=BOS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    drawn = torch.randint(1, VOCABULARY, (SENTENCES, TOKENS - 1)).tolist()
    sentences = tuple(" ".join(f"w{i}" for i in row) for row in drawn)
    places = tuple(map(str, range(SENTENCES)))
    texts = TextSet(
        name="random", sentences={"xx": sentences}, ids=places, parts=("all",) * SENTENCES, registers=("",) * SENTENCES,
        parallel=True, sha256="0" * 64,
    )  # fmt: skip
    return from_loaded(model, PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS)), texts


def plans_of(units: UnitMap, combine: int) -> Plans:
    names = tuple(f"layers.{layer}" for layer in range(units.layers))
    plans = single_plans(names, ("protect-one",))
    if combine == 2:
        plans += combined_plans(names, 2, "protect-one")
    return {plan.name: plan.precisions(names, "int4") for plan in plans}


def walk(loaded: LoadedModel, plans: Plans, units: UnitMap, texts: TextSet, rounding: str) -> dict[str, StateScores]:
    return score_plans(loaded, plans, texts, units=units, bank=make_bank(loaded, units, rounding))


def loop(loaded: LoadedModel, plans: Plans, units: UnitMap, texts: TextSet, rounding: str) -> dict[str, list[float]]:
    """The seeds' way: nats a token of every sentence under every plan."""
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(list(texts.sentences["xx"]))["input_ids"]]
    original = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[str, list[float]] = {}
    for plan, precisions in plans.items():
        model.load_state_dict(original)
        bank = make_bank(loaded, units, rounding)
        rounded = [bank.weights(unit, precision) for unit, precision in units.expanded(precisions).items()]
        for name, value in ((name, value) for values in rounded for name, value in values.items()):
            model.get_parameter(name).data = value
        with torch.no_grad():
            losses = [model(ids, labels=ids).loss for ids in torch.tensor(rows)[:, None]]
        found[plan] = [float(loss) for loss in losses]
    model.load_state_dict(original)
    return found


def products(passes: int, layers: int, width: int, dtype: torch.dtype) -> None:
    """The matrix products of the tree, in the sizes in which the tree does them, and nothing else."""
    weights = [torch.randn(rows, cols, dtype=dtype) for rows, cols in block_shapes(width)]
    inputs = {cols: torch.randn(1024, cols, dtype=dtype) for cols in (width, 4 * width)}
    for _ in range(passes * SENTENCES * TOKENS // 1024):
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
    head = torch.randn(VOCABULARY, width, dtype=dtype)
    for _ in range((layers + 2) * SENTENCES * (TOKENS - 1) // 1024):
        for part in head.split(2048):
            torch.nn.functional.linear(inputs[width], part)


def block_shapes(width: int) -> list[tuple[int, int]]:
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def nats_per_token(scores: StateScores) -> list[float]:
    found = scores.languages["xx"]
    return [nll / tokens for nll, tokens in zip(found.nll_nats, found.tokens, strict=True)]


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds, and the last result. The first call warms up and does not count where there are more."""
    result, seconds = None, []
    for _ in range(repeats + (repeats > 1)):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:] or seconds), result


def row(benchmark: str, **figures: Any) -> dict[str, Any]:
    return {"benchmark": f"sweep_{benchmark}"} | figures | {
        "threads": torch.get_num_threads(),
        "seed": 0,
        "versions": package_versions(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "command": " ".join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def keep(rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of the old ones of the same thing."""
    old = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    known = {identity(one) for one in rows}
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in old if identity(one) not in known] + [
        json.dumps(one, ensure_ascii=False) + "\n" for one in rows
    ]
    write_atomically(ROWS, "".join(lines).encode())


def identity(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(one.get(key) for key in ("benchmark", "shape", "rounding", "dtype", "model", "objective", "threads"))


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def tables() -> dict[str, str]:
    """The table of the page, from the rows."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    lines = [
        "| Layers x width | Rounding | Tree in | Loop | Tree | Faster | Its products alone |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {one['shape']} | {one['rounding']} | {one['dtype']} | {one['loop_seconds']:.1f} s | "
        f"{one['tree_seconds']:.1f} s | {one['ratio']:.1f}x | {one['floor_seconds']:.1f} s |"
        for one in rows
        if one["benchmark"] == "sweep_speed"
    ]
    return {"speed": "\n".join(lines) + "\n"}


def report(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "pairs", "bfloat16", "render"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--shapes", default="12x768,32x512")
    parser.add_argument("--rounding", default="tensor", choices=ROUNDINGS)
    parser.add_argument("--models", default="demo,demo-gpt2")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.what == "speed":
        for shape in chosen.shapes.split(","):
            keep(measure_speed(shape, chosen.rounding, chosen.repeats))
    elif chosen.what == "render":
        render()
    elif chosen.what == "pairs":
        keep(measure_pairs(chosen.repeats))
    else:
        for model in chosen.models.split(","):
            keep(measure_bfloat16(model))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
