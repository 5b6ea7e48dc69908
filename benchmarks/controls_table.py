"""What a searched plan is worth against plans that needed no search, at equal bytes: both bundled models, six grids.

    python benchmarks/controls_table.py measure [--models demo] [--bits 4] [--groups 128]   # hours on two cores
    python benchmarks/controls_table.py render                                   # rewrites docs/controls.md

Per grid, layers are swept on the `search` part of the bundled sentences, the three best are protected in 16 bit, and
the same bytes are also given to an allocation of 8 and 16 bit by integer programming. Both, 20 random sets of three
layers and every other control are then evaluated on the `confirm` part, all with round-to-nearest weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from pages import write_tables

from quant_fairness_plugin.artifacts import package_versions, write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "controls_table.jsonl"
PAGE = ROOT / "docs" / "controls.md"
MODELS = ("demo", "demo-gpt2")
WIDTHS = (4, 3, 2)
GROUPS = (128, 32)
TOP = 3
ALLOCATED = "allocated"
SEED = 0


def measure(models: Sequence[str], widths: Sequence[int], groups: Sequence[int]) -> None:
    """Measure these and put their rows in place of the old ones, one grid after another."""
    for model, group, bits in product(models, groups, widths):
        new = list(measure_grid(model, bits, group))
        kept = [row for row in read_rows() if (row["model"], row["bits"], row["group"]) != (model, bits, group)]
        order = sorted(kept + new, key=lambda row: (MODELS.index(row["model"]), -row["group"], -row["bits"]))
        write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in order).encode())


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def measure_grid(model: str, bits: int, group: int) -> Iterator[dict[str, Any]]:
    """One row per plan, and one for what they say together."""
    from quant_fairness_plugin.artifacts import Bootstrap, Grid
    from quant_fairness_plugin.evidence import Rivals, gather_evidence
    from quant_fairness_plugin.model.load import load_model
    from quant_fairness_plugin.recommend import Limit, recommend_plan
    from quant_fairness_plugin.sweep.config import SweepConfig
    from quant_fairness_plugin.sweep.engine import sweep_units
    from quant_fairness_plugin.texts.load import load_texts

    loaded, texts = load_model(model), load_texts("bundled")
    grid = Grid(bits=bits, group_size=group)
    wanted = SweepConfig(precisions=("fp16", "int8"), top=TOP)
    report = sweep_units(loaded, texts.part("search"), wanted, grid=grid, bootstrap=Bootstrap(seed=SEED))
    plan = recommend_plan(report, top=TOP)
    floor = round(plan.extra_bytes / plan.overhead)
    rival = recommend_plan(report, Limit(max_bytes=floor + plan.extra_bytes))
    rivals = {ALLOCATED: rival} if rival.extra_bytes else {}
    supported = [name for name, status in report.languages.items() if status == "supported"]
    known = texts.choose(supported)
    evidence = gather_evidence(
        loaded,
        plan,
        known.part("confirm"),
        rivals=Rivals(texts=known.part("search"), plans=rivals),
        bootstrap=Bootstrap(None, seed=SEED),
    )
    origin = {
        "model": model, "bits": bits, "group": group, "seed": SEED, "versions": package_versions(),
        "machine": platform.machine(), "command": " ".join(["python", *sys.argv]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    outcomes = {comparison.control: comparison.outcome for comparison in evidence.comparisons}
    on_frontier = set(evidence.frontier.plans)
    for row in evidence.rows:
        yield {
            "row": row.name,
            "protects": row.precisions,
            "bytes": row.bytes_,
            "equal_bytes": row.matched,
            "worst_kl": asdict(row.worst),
            "mean_kl": asdict(row.mean),
            "plan_against_it": outcomes.get(row.name),
            "on_frontier": row.name in on_frontier,
        } | origin
    yield {
        "row": "summary",
        "protects": plan.protected_layers,
        "stable": plan.stable,
        "reasons": [
            *plan.reasons,
            *(rival.reasons if rivals else [f"no {ALLOCATED} plan: {'; '.join(rival.reasons)}"]),
        ],
        "standing": asdict(evidence.standing),
        "languages": evidence.languages,
        "verdict": evidence.verdict,
    } | origin


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def tables() -> dict[str, str]:
    """Name → lines of Markdown."""
    return {
        "summary": summary_table() + "\n",
        "outcomes": outcome_table() + "\n",
        "grids": "\n".join(grid_sections()) + "\n",
    }


def summary_table() -> str:
    """One line per grid."""
    lines = [
        "| Model | Grid | None | Three layers in 16 bit | Random sets, median (best) | Percentile [95 %] | "
        "Allocated 8/16 bit | One bit more for all |",
        "| --- | --- | ---: | --- | ---: | --- | ---: | ---: |",
    ]
    for (model, bits, group), rows in by_grid().items():
        named = {row["row"]: row for row in rows}
        said, plan = named["summary"], named["the plan"]
        random = sorted(value(row) for name, row in named.items() if name.startswith("random "))
        wider = named.get(f"uniform int{bits + 1}")
        lines.append(
            f"| `{model}` | INT{bits} g{group} | {shown(named['none'])} | {shown(plan)} "
            f"({', '.join(map(str, said['protects']))}) | {milli(random[len(random) // 2])} ({milli(random[0])}) | "
            f"{standing(said['standing'])} | {shown(named.get(ALLOCATED))} | {with_bytes(wider, plan)} |"
        )
    return "\n".join(lines)


def outcome_table() -> str:
    """On how many grids the plan beats each control."""
    counts: dict[str, Counter[str]] = {}
    for rows in by_grid().values():
        for row in rows:
            if row["row"] != "summary" and row["plan_against_it"]:
                counts.setdefault(row["row"], Counter())[row["plan_against_it"]] += 1
    lines = [
        "| Control | The plan beats it | Cannot be told apart | It beats the plan |",
        "| --- | ---: | ---: | ---: |",
    ]
    order = sorted(counts, key=lambda name: -counts[name]["beaten"])
    lines += [
        f"| {name} | {counts[name]['beaten']} | {counts[name]['not beaten']} | {counts[name]['better']} |"
        for name in order
    ]
    return "\n".join(lines)


def grid_sections() -> Iterator[str]:
    """The verdict and every plan, grid by grid."""
    for (model, bits, group), rows in by_grid().items():
        said = next(row for row in rows if row["row"] == "summary")
        yield f"\n### `{model}`, INT{bits}, groups of {group}\n"
        yield f"Verdict: {said['verdict']}. The ranking is {'stable' if said['stable'] else 'NOT stable'}.\n"
        yield "| Plan | Protects | Bytes over the plan's | Worst KL | Mean KL | The plan against it | Frontier |"
        yield "| --- | --- | ---: | ---: | ---: | --- | --- |"
        plan = next(row for row in rows if row["row"] == "the plan")
        yield random_line([row for row in rows if row["row"].startswith("random ")])
        uniform = [row["protects"] for row in rows if row["row"].startswith("uniform ")]
        for row in rows:
            # Where the bytes pay for all layers, a spread plan is the uniform one.
            same = row["row"].startswith("spread ") and row["protects"] in uniform
            if same or row["row"] == "summary" or row["row"].startswith("random "):
                continue
            yield (
                f"| {row['row']} | {protects(row)} | {row['bytes'] / plan['bytes'] - 1:+.1%} | {shown(row)} | "
                f"{milli(row['mean_kl'].get('estimate'))} | {row['plan_against_it'] or ''} | "
                f"{'yes' if row['on_frontier'] else ''} |"
            )


def random_line(rows: list[dict[str, Any]]) -> str:
    """All random sets in one line: the median and the range."""
    worst = sorted(value(row) for row in rows)
    mean = sorted(float(row["mean_kl"].get("estimate", float("inf"))) for row in rows)
    middle = len(rows) // 2
    return (
        f"| {len(rows)} random sets, median (range) | | +0.0% | {milli(worst[middle])} ({milli(worst[0])} to "
        f"{milli(worst[-1])}) | {milli(mean[middle])} ({milli(mean[0])} to {milli(mean[-1])}) | | |"
    )


def by_grid() -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in read_rows():
        found.setdefault((row["model"], row["bits"], row["group"]), []).append(row)
    return found


def value(row: dict[str, Any]) -> float:
    return float(row["worst_kl"].get("estimate", float("inf")))


def milli(number: float | None) -> str:
    return "undefined" if number is None or number == float("inf") else f"{1000 * number:.3g}"


def shown(row: dict[str, Any] | None) -> str:
    """The worst KL in 1/1000 bit per byte with its interval."""
    if row is None:
        return "none found"
    kl = row["worst_kl"]
    return f"{milli(kl['estimate'])} [{milli(kl['low'])}, {milli(kl['high'])}]" if "estimate" in kl else "undefined"


def with_bytes(row: dict[str, Any] | None, plan: dict[str, Any]) -> str:
    return "" if row is None else f"{milli(value(row))} ({row['bytes'] / plan['bytes'] - 1:+.0%} bytes)"


def standing(found: dict[str, Any]) -> str:
    if "undefined" in found:
        return str(found["undefined"])
    return f"{found['percentile']:.0f} [{found['low']:.0f}, {found['high']:.0f}]"


def protects(row: dict[str, Any]) -> str:
    """`0, 7, 9` in 16 bit, `3:int8`, or `all in int5`."""
    names = row["protects"]
    kinds = set(names.values())
    if len(kinds) == 1 and row["row"].startswith("uniform"):
        return f"all in {kinds.pop()}"
    return ", ".join(
        name.removeprefix("layers.") + ("" if kind == "fp16" else f":{kind}") for name, kind in names.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)))
    chosen = parser.parse_args()
    if chosen.what == "measure":
        measure(
            chosen.models.split(","),
            [int(bits) for bits in chosen.bits.split(",")],
            [int(group) for group in chosen.groups.split(",")],
        )
    else:
        render()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
