"""Three ways to make `demo` smaller and what they do to its languages: quantized, pruned, a student of half its depth.

    python examples/train_demo_student.py --data CORPUS --out DIR    # half an hour on one core; weights are not stored
    python benchmarks/trifecta_table.py measure --student DIR        # minutes; writes the rows
    python benchmarks/trifecta_table.py render                       # the tables of docs/analyses.md

All states are measured together, on the `confirm` part of the bundled sentences and under the same resamples of them.
INT4 is written by the exporter and read back. INT3 is a simulation in memory. Pruned models are changed in memory, too,
and take the bytes of the 16-bit model in every format that is written here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pages import write_tables
from rows import conditions

from quant_fairness_plugin.artifacts import LanguageDamage, Number, StateScores, write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "trifecta.jsonl"
PAGE = ROOT / "docs" / "analyses.md"
MODEL = "demo"
QUANTIZED = {
    "INT4, nearest": {"method": "rtn", "bits": 4},
    "INT3, nearest": {"method": "rtn", "bits": 3},
    "INT4, GPTQ": {"method": "gptq", "bits": 4},
}
WRITTEN_BITS = 4
"""Other widths are a simulation: their bytes are those of integers and scales, packed."""
PRUNED = (0.3, 0.5, 0.7)
STUDENT = "student of half the depth"
RATIOS = {"kl": "KL a byte", "bpb": "bits per byte", "sentence": "KL a sentence"}
SEED = 0


def measure(student: Path) -> None:
    """Make and measure every state, and replace the rows."""
    import torch

    from quant_fairness_plugin import FairQuantizer
    from quant_fairness_plugin.measure.scoring import fixed_state
    from quant_fairness_plugin.model.resolve import bundled_folder, model_sha256

    torch.set_num_threads(1)
    training = read_training(bundled_folder(MODEL))
    languages = tuple(training["mixture"])
    base = FairQuantizer.from_pretrained(MODEL, protect_layers="none", seed=SEED, languages=languages)
    small = FairQuantizer.from_pretrained(student, protect_layers="none", seed=SEED, languages=languages)
    if small.loaded.tokenizer.get_vocab() != base.loaded.tokenizer.get_vocab():
        raise SystemExit(f"{student} has another tokenizer than {MODEL}")
    whole = weight_bytes(bundled_folder(MODEL))
    with tempfile.TemporaryDirectory() as work:
        made = dict(quantized(base, languages, Path(work))) | dict(pruned(base.loaded, whole))
        learned = trained(read_training(student)) | {"teacher_tokens": training["tokens"]}
        learned |= {"sha256": model_sha256(small.loaded.files)}
        more = {"kind": "distilled", "bytes": weight_bytes(student), "trained": learned}
        made[STUDENT] = fixed_state(STUDENT, small.loaded.model), more
        measured = base.measure(*(state for state, _ in made.values()))
    same = {"model": MODEL, "sixteen_bit_bytes": whole, "shares": training["mixture"]}
    same |= conditions(command="python benchmarks/trifecta_table.py measure --student DIR", seed=SEED)
    rows = [{"state": name} | more | row_of(measured, name, same["shares"]) | same for name, (_, more) in made.items()]
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_training(folder: Path) -> dict[str, Any]:
    """Return how a model was trained."""
    record: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    return record


def trained(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says of the student's training."""
    return {name: record[name] for name in ("command", "loss", "layers", "teacher", "tokens", "steps", "seconds")}


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quantized(base: Any, languages: tuple[str, ...], work: Path) -> Iterator[tuple[str, Any]]:
    """Yield quantized states, read back from their checkpoints where those are written, and what their rows say."""
    from quant_fairness_plugin import FairQuantizer, steps
    from quant_fairness_plugin.analysis.named_plans import NOTHING, NamedPlan, bytes_of
    from quant_fairness_plugin.quantize.in_blocks import quantized_state

    for number, (name, options) in enumerate(QUANTIZED.items()):
        options = options | {"protect_layers": "none", "seed": SEED, "languages": languages}
        made, folder = FairQuantizer.from_pretrained(MODEL, **options), work / str(number)
        more = {"kind": "quantized", "method": made.config.method, "grid": str(made.config.grid)}
        if made.config.bits == WRITTEN_BITS:
            steps.write(made.quantize(), folder, made.texts, made.config)
            state = steps.exported_state(folder, base.loaded)._replace(name=name)
            more |= {"format": made.config.format, "bytes": weight_bytes(folder)}
        else:
            state = quantized_state(name, made.quantize())
            [size], _ = bytes_of([NamedPlan(name=NOTHING)], made.loaded, made.config.grid)
            more |= {"format": None, "bytes": size}
        yield name, (state, more)


def pruned(loaded: Any, whole: int) -> Iterator[tuple[str, Any]]:
    """Yield the states without the smallest weights of all layers."""
    from quant_fairness_plugin.analysis.variants import prune_globally
    from quant_fairness_plugin.measure.scoring import ModelState
    from quant_fairness_plugin.model.exchange import swapped
    from quant_fairness_plugin.plans.units import map_units

    units = map_units(loaded)
    for share in PRUNED:
        make, name = prune_globally(loaded, units, share), f"{share:.0%} pruned"
        weights = {key: value for unit in units.group_names() for key, value in make(unit).items()}
        zeros = sum(int((value == 0).sum()) for value in weights.values())
        zero_share = zeros / sum(value.numel() for value in weights.values())
        state = ModelState(name, partial(swapped, loaded, weights))
        yield name, (state, {"kind": "pruned", "bytes": whole, "zero_share": zero_share})


def row_of(measured: Any, name: str, shares: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of a state, language by language and of all together."""
    found = measured.measurements[name]
    scores, before = measured.scores[name], measured.scores[measured.baseline]
    return {
        "part": found.part,
        "sentences": found.languages[0].sentences,
        "text_sha256": found.provenance.text_sha256,
        "model_sha256": found.provenance.model_sha256,
        "worst_kl": asdict(found.worst_kl),
        "mean_kl": asdict(found.mean_kl),
        "mean_delta_bpb": asdict(found.mean_delta_bpb),
        "low_over_high": ratios(before, scores, found.languages, measured.bootstrap),
        "share_rho": asdict(share_rho(found.languages, shares)),
        "languages": {row.language: of_language(row) for row in found.languages},
    }


def of_language(row: LanguageDamage) -> dict[str, Any]:
    """Return what a state's row says of one language."""
    figures = {"kl": asdict(row.kl_bits_per_byte), "delta_bpb": asdict(row.delta_bpb)}
    return figures | {"status": row.status, "baseline_bpb": row.baseline_bpb}


def ratios(before: StateScores, after: StateScores, damage: Any, bootstrap: Any) -> dict[str, Any]:
    """Return the mean of low-resource languages over that of high-resource ones, by each of `RATIOS`."""
    from quant_fairness_plugin.analysis.causes import low_over_high
    from quant_fairness_plugin.measure.damage import count_sentences
    from quant_fairness_plugin.measure.intervals import Resamples, weighted_sums

    weights = Resamples.of(bootstrap, count_sentences(after)).weights
    series: dict[str, dict[str, Any]] = {kind: {} for kind in RATIOS}
    for row in damage:
        if row.status == "unsupported":
            continue
        old, new = before.languages[row.language], after.languages[row.language]
        lost = np.array(new.nll_nats) - np.array(old.nll_nats)
        sums = weighted_sums(weights, np.array([new.kl_nats, lost, new.bytes_], dtype=np.float64).T.copy())
        kl, loss, bytes_ = sums.T
        series["kl"][row.language], series["bpb"][row.language] = kl / bytes_, loss / bytes_
        series["sentence"][row.language] = kl  # sentences are parallel, and as many in every language
    return {kind: asdict(low_over_high(values)) for kind, values in series.items()}


def share_rho(damage: Any, shares: Mapping[str, float]) -> Number:
    """Return the rank correlation of KL a byte with a language's share of the training text, over all languages."""
    from quant_fairness_plugin.analysis.correlations import over_items, spearman

    known = [row for row in damage if row.status != "unsupported"]
    rho = spearman([shares[row.language] for row in known], [row.kl_bits_per_byte.estimate for row in known])
    return over_items(rho, len(known)) if isinstance(rho, float) else rho


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return the Markdown tables by name."""
    rows = read_rows()
    if not rows:
        return dict.fromkeys(("trifecta", "trifecta-languages"), "Not measured yet.\n")
    return {"trifecta": whole_table(rows), "trifecta-languages": language_table(rows)}


def whole_table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each state, and what the intervals of the ratios allow to be said."""
    heads = [
        "model",
        "bytes",
        "worst KL",
        "mean KL",
        *(f"low/high, {name}" for name in RATIOS.values()),
        "ρ with share",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for row in rows:
        share = f"{row['bytes'] / 1e6:.1f} MB, {row['bytes'] / row['sixteen_bit_bytes']:.0%}"
        share += "" if row.get("format", "plain") else ", not written"
        cells = [thousandths(row["worst_kl"]), thousandths(row["mean_kl"])]
        cells += [shown(row["low_over_high"][kind]) for kind in RATIOS] + [shown(row["share_rho"])]
        lines.append(f"| {row['state']} | {share} | {' | '.join(cells)} |")
    said = ["| by | low-resource languages lose more | less | not decided |", "|---|---|---|---|"]
    said += [f"| {name} | {' | '.join(verdict(rows, kind))} |" for kind, name in RATIOS.items()]
    return "\n".join([*lines, "", *said, "", learned(rows), ""])


def verdict(rows: list[dict[str, Any]], kind: str) -> list[str]:
    """Return under which states low-resource languages lose more, under which less, and which decide nothing."""
    found = {row["state"]: row["low_over_high"][kind] for row in rows}
    more = [name for name, value in found.items() if value.get("low", 0) > 1]
    less = [name for name, value in found.items() if value.get("high", 2) < 1]
    rest = [name for name in found if name not in more + less]
    return ["; ".join(names) or "none" for names in (more, less, rest)]


def learned(rows: list[dict[str, Any]]) -> str:
    """Return how the student was trained, beside its teacher."""
    taught = next(row["trained"] for row in rows if row["kind"] == "distilled")
    share = taught["tokens"] / taught["teacher_tokens"]
    depth = f"{taught['layers']} of {taught['teacher']['layers']} layers"
    said = (
        f"The student has {depth} and was trained for {taught['steps']:,} steps on {taught['tokens']:,} tokens, "
        f"{share:.0%} of the {taught['teacher_tokens']:,} that its teacher saw; {taught['seconds'] / 60:.0f} minutes."
    )
    return textwrap.fill(said, 120)


def language_table(rows: list[dict[str, Any]]) -> str:
    """Return a line for each language: KL and loss of bits per byte under every state."""
    shares = rows[0]["shares"]
    lines = [f"| language | share | {' | '.join(row['state'] for row in rows)} |", f"|---|---:|{'---:|' * len(rows)}"]
    for language in rows[0]["languages"]:
        cells = [cell(row["languages"][language]) for row in rows]
        lines.append(f"| {language} | {shares[language]:.0%} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def cell(found: Mapping[str, Any]) -> str:
    """Return `31, 28`: KL and loss, thousandths; a status that is not `supported` is told."""
    figures = ", ".join(f"{1000 * found[name]['estimate']:.3g}" for name in ("kl", "delta_bpb"))
    return figures if found["status"] == "supported" else f"{figures} ({found['status']})"


def thousandths(value: Mapping[str, Any]) -> str:
    """Return `419 [388, 455]`."""
    return written(value, lambda figure: f"{1000 * figure:.3g}")


def shown(value: Mapping[str, Any]) -> str:
    """Return `0.61 [0.57, 0.64]`."""
    return written(value, lambda figure: f"{figure:.2f}")


def written(value: Mapping[str, Any], form: Callable[[float], str]) -> str:
    """Return a figure with its interval, or that it is undefined."""
    if "undefined" in value:
        return "undefined"
    return f"{form(value['estimate'])} [{form(value['low'])}, {form(value['high'])}]"


def render() -> None:
    """Write the tables into their page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Measure all states, or render what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("--student", type=Path, help="folder of examples/train_demo_student.py")
    given = parser.parse_args()
    if given.what == "measure":
        if given.student is None:
            parser.error("measure needs --student DIR")
        measure(given.student)
    render()


if __name__ == "__main__":
    main()
