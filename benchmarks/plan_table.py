"""What one pass of gradients buys: the plan of `auto` at +10 % bytes against INT4 everywhere and against 16-bit layers.

    python benchmarks/plan_table.py measure demo --exhaustive         # minutes on one core; writes the rows
    python benchmarks/plan_table.py measure demo --exhaustive --bits 3
    python benchmarks/plan_table.py measure SmolLM2-135M --folder out/smollm2-135m --langs en,fr,es,de,ru,zh,ar
    python benchmarks/plan_table.py render                            # rewrites docs/planning.md

All three are quantized by GPTQ on the same rows and measured in memory on sentences of the `confirm` part; the plan is
chosen on the `search` part. The 16-bit layers are chosen by the same scores under the same budget. With `--exhaustive`,
a plan of the same budget from a sweep that evaluates every unit in every precision stands beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import forecast_table
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "plan_table.jsonl"
PAGE = ROOT / "docs" / "planning.md"
MODELS = ("demo", "demo-gpt2", "SmolLM2-135M")
WIDTHS = (4, 3)
OVERHEAD = 0.1
SEED = 0
NONE, PLAN, LAYERS, SWEPT = "INT4", "auto", "16-bit layers", "exhaustive"
"""States; the first is INT3 where the rest has 3 bits."""


def measure(given: argparse.Namespace) -> None:
    """Measure a model and put its rows in place of its old ones."""
    import torch

    torch.set_num_threads(1)
    asked = {
        "--langs": given.langs,
        "--sentences": given.sentences,
        "--search": given.search,
        "--bits": given.bits if given.bits != 4 else None,
    }
    options = "".join(f" {flag} {value}" for flag, value in asked.items() if value)
    options += " --exhaustive" if given.exhaustive else ""
    states = list(measure_model(given))
    made = conditions(command=f"python benchmarks/plan_table.py measure {given.model}{options}", seed=SEED)
    new = [{"model": given.model, "bits": given.bits} | made | row for row in states]
    kept = [row for row in read_rows() if key(row) != key(new[0])] if ROWS.exists() else []
    rows = sorted(kept + new, key=lambda row: (MODELS.index(row["model"]), WIDTHS.index(key(row)[1])))
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def key(row: dict[str, Any]) -> tuple[str, int]:
    """What a table is of: a model, and the bits of most of it (rows of before they were noted: 4)."""
    return row["model"], row.get("bits", 4)


def measure_model(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per state."""
    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.exchange import swapped

    options: Any = {
        "seed": SEED, "max_overhead": OVERHEAD, "bits": given.bits,
        "texts": text_set(given.langs, confirm=given.sentences, search=given.search),
        "reader": "vllm" if given.model == "demo-gpt2" else "transformers",
        "format": "compressed-tensors" if given.bits == 4 else "fp16-twin",  # other widths are simulated
    }  # fmt: skip
    base = FairQuantizer.from_pretrained(given.folder or given.model, **options)
    seconds, clock = {}, time.process_time
    start = clock()
    bare = base.quantize(base.protecting("none").recommend())
    seconds["quantize INT4"] = clock() - start
    base = base.protecting("auto")
    base._bare = bare
    start = clock()
    base.score()
    seconds["score"] = clock() - start
    start = clock()
    plan = base.recommend()
    seconds["choose and compare"] = clock() - start
    sys.stderr.write("\n".join((*plan.reasons, f"{seconds}")) + "\n")
    layers, layer_weights = sixteen_bit_layers(base)
    start = clock()
    quantized = base.quantize(plan)
    seconds["quantize the plan"] = clock() - start
    weights = {NONE: bare.dense_weights(), PLAN: quantized.dense_weights(), LAYERS: layer_weights}
    plans = {NONE: bare.plan, PLAN: plan, LAYERS: layers}
    if given.exhaustive:
        start = clock()
        sweeping = FairQuantizer.from_pretrained(given.folder or given.model, exhaustive=True, **options)
        plans[SWEPT] = plan_of_sweep(sweeping)
        seconds["sweep"] = clock() - start
        weights[SWEPT] = base.quantize(plans[SWEPT]).dense_weights()
    states = [ModelState(key, partial(swapped, base.loaded, value)) for key, value in weights.items()]
    measured = base.measure(*states)
    for state, made in plans.items():
        result = measured.measurements[state]
        yield {
            "state": state, "grid": str(made.grid), "overhead": made.overhead, "extra_bytes": made.extra_bytes,
            "units": made.overrides, "layers": list(made.protected_layers), "reasons": list(made.reasons),
            "stable": made.stable, "part": "confirm", "sentences": result.languages[0].sentences,
            "search_sentences": len(base.texts.part("search")),
            "worst_kl": asdict(result.worst_kl), "mean_kl": asdict(result.mean_kl),
            "kl": {row.language: asdict(row.kl_bits_per_byte) | {"status": row.status} for row in result.languages},
            "gain_over_int4": None if state == NONE else asdict(measured.gain(NONE, state)), "cpu_seconds": seconds,
            "model_sha256": result.provenance.model_sha256, "text_sha256": result.provenance.text_sha256,
        }  # fmt: skip


def plan_of_sweep(base: Any) -> Any:
    """The plan of the same budget from a sweep of every unit in every precision, stable or not.

    The command protects nothing where the ranking of units is unstable; here the plan itself is what is compared.
    """
    from quant_fairness_plugin.planning import limit_of
    from quant_fairness_plugin.recommend.allocated import Goal, plan_by_allocation
    from quant_fairness_plugin.recommend.ranked import Ranker, Ranking

    class Trusting(Ranker):
        def is_stable(self, ranking: Ranking) -> bool:
            return True

    report = base.sweep(granularity="unit", precisions=base.config.menu)
    ranker = Trusting(report, base.config.objective, strict=False, draws=2000)
    return plan_by_allocation(ranker, Goal(limit=limit_of(base.loaded, base.config), overrides={}))


def text_set(languages: str | None, *, confirm: int | None, search: int | None) -> Any:
    """The bundled text set in some languages, with so many sentences of two of its parts (None: all)."""
    from quant_fairness_plugin.texts.load import load_texts

    texts = load_texts("bundled", languages=None if languages is None else tuple(languages.split(",")))
    kept = {i for i, part in enumerate(texts.parts) if part == "calibrate"}
    for part, wanted in (("confirm", confirm), ("search", search)):
        rows = [i for i, held in enumerate(texts.parts) if held == part]
        some = len(rows) if wanted is None else wanted
        kept |= {rows[i * len(rows) // some] for i in range(some)}
    return replace(texts.take(sorted(kept)), name="bundled sentences")  # which bring no documents to calibrate on


def sixteen_bit_layers(base: Any) -> tuple[Any, dict[str, Any]]:
    """The plan of whole layers in 16 bit by the same scores and budget, and its weights beside those of `INT4`."""
    from quant_fairness_plugin.planning import limit_of
    from quant_fairness_plugin.recommend.estimated import Demand, Planner

    demand = Demand(limit=limit_of(base.loaded, base.config), menu=("fp16",), whole_layers=True)
    planner = Planner(base.score(), demand)
    plan = planner.plan(planner.candidates()[:1])
    prefixes = tuple(f"{base.loaded.family.blocks}.{layer}." for layer in plan.protected_layers)
    weights = {
        name: value for name, value in base._bare.dense_weights().items() if not name.startswith(prefixes or "-")
    }
    return replace(plan, source="16-bit layers by scores"), weights


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]


def render() -> None:
    rows = read_rows()
    parts = [PREFACE]
    for model, bits in ((model, bits) for model in MODELS for bits in WIDTHS):
        mine = {row["state"]: row for row in rows if key(row) == (model, bits)}
        if mine:
            parts += [f"## {model}{'' if bits == 4 else f', INT{bits}'}\n", table(mine), sentences_of(mine)]
    PAGE.write_text("\n".join([*parts, TIMES]), encoding="utf-8")
    # The page's last tables have rows of their own.
    write_tables(PAGE, forecast_table.tables())


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of KL per language and state, in thousandths of a bit per byte."""
    none = f"INT{key(rows[NONE])[1]}"
    titles = [f"{state}, +{100 * row['overhead']:.1f} %" if state != NONE else none for state, row in rows.items()]
    lines = ["| language | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
    for language, first in rows[NONE]["kl"].items():
        name = language if first["status"] == "supported" else f"{language} ({first['status']})"
        lines.append(f"| {name} | " + " | ".join(figure(row["kl"][language]) for row in rows.values()) + " |")
    for label, name in (("worst KL", "worst_kl"), ("mean KL", "mean_kl")):
        lines.append(f"| **{label}** | " + " | ".join(figure(row[name]) for row in rows.values()) + " |")
    return "\n".join([*lines, ""])


def sentences_of(rows: dict[str, dict[str, Any]]) -> str:
    plan, layers = rows[PLAN], rows[LAYERS]
    seconds = ", ".join(f"{what} {value:.0f}" for what, value in plan["cpu_seconds"].items())
    gains = [figure(row["gain_over_int4"]) for row in (plan, layers)]
    swept = rows.get(SWEPT)
    beside = ""
    if swept is not None:
        ratio = plan["worst_kl"]["estimate"] / swept["worst_kl"]["estimate"]
        # What is scored are the errors of GPTQ itself, so that the fast plan needs a quantization, and the sweep none.
        taken = sum(plan["cpu_seconds"][part] for part in ("quantize INT4", "score", "choose and compare"))
        beside = (
            f" The sweep's plan: {swept['reasons'][0]}. The worst KL of `auto` is {ratio:.2f} of it, for 1 / "
            f"{plan['cpu_seconds']['sweep'] / taken:.1f} of the CPU time, the quantization that scores need included."
        )
    return (
        f"{'; '.join(plan['reasons'])}. Measured on {plan['sentences']} confirm sentences a language: the worst "
        f"language's KL falls by {gains[0]} over `INT{key(plan)[1]}`, and by {gains[1]} with "
        f"{layers['reasons'][0].split('; predicted')[0]}. CPU seconds ({plan['machine']}): {seconds}.{beside}\n"
    )


def figure(value: dict[str, Any]) -> str:
    if "undefined" in value:
        return "undefined"
    return f"{1000 * value['estimate']:.1f} [{1000 * value['low']:.1f}, {1000 * value['high']:.1f}]"


PREFACE = """# Plans by one pass of gradients

Written by `benchmarks/plan_table.py`; the rows (versions, machine, seed, command, checksums) are in
`benchmarks/results/cpu/plan_table.jsonl`. KL to the 16-bit model in thousandths of a bit per byte, with 95 % bootstrap
intervals over sentences. All states are GPTQ on the bundled calibration rows; there is one calibration draw, which the
intervals say nothing about. In `auto` the units in 8 bit and all others are quantized together; the 16-bit layers are
put back into `INT4`; none where one layer costs more than the budget. `exhaustive` is the plan of the same budget from
a sweep that evaluates every unit in 8 and in 16 bit exactly, all rounded to nearest (its bank; it quantizes nothing by
GPTQ, while `auto` scores GPTQ's errors), taken whether or not its ranking is stable (the command would protect nothing
then). Scores, choice and comparison are of the `search` part. INT3 is simulated. SmolLM2-135M is
dequantized from a 4-bit file, so that its figures are those of a second quantization; it was swept on 20 sentences a
language of that part, and the time of a sweep grows with them. All are calibrated on the part `calibrate` alone.
"""

TIMES = """## How long it takes

`quant-fairness plan` says beforehand how long a run takes: parts of the work are timed for a few seconds, and counted.
Each row below is a command right behind its forecast, on one thread (`benchmarks/forecast_table.py`, rows in
`benchmarks/results/cpu/forecast_table.jsonl`). The ratios are to the geometric middle of the forecast; bold is off by
more than 1.5 times. Load is the number of processes that wanted the machine's two cores before and after, by the last
minute's average; above 2, wall seconds count what others did. The forecast counts other work as it is at that moment
(`other work then`), which does not stay the same. CPU seconds are about what the wall would be on a machine of one's
own; their ratio is to the forecast without other work.

<!-- table forecast -->
<!-- end -->

Searches with [`--time`](quantize.md): `recommend --max-overhead 0.1`, on the same busy machine. The command's seconds
hold starting Python and reading the model as well, which the stated time does not.

<!-- table search-time -->
<!-- end -->
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("model", nargs="?", default="demo", choices=MODELS)
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--langs")
    parser.add_argument("--sentences", type=int, help="of the confirm part; all by default")
    parser.add_argument("--search", type=int, help="sentences of the search part; all by default")
    parser.add_argument("--bits", type=int, choices=WIDTHS, default=4, help="of all that a plan does not single out")
    parser.add_argument("--exhaustive", action="store_true", help="a sweep of all units and its plan as well")
    given = parser.parse_args()
    if given.what == "measure":
        measure(given)
    else:
        render()
