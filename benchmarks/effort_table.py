"""What more work does for the same bytes: ways to improve on GPTQ, each against GPTQ alone on the same rows.

    python benchmarks/effort_table.py measure demo refined        # one variant on one model; adds its rows
    python benchmarks/effort_table.py measure SmolLM2-135M shifted --folder out/smollm2-135m --langs en,fr,es,ru,ar,zh
    python benchmarks/effort_table.py render                      # the table of docs/calibration.md

INT4 with `--clip mse`, no unit singled out, calibrated on the bundled rows, in memory, measured on the `confirm` part.
The variants are written out here: what proves itself is in the library too.

- `gptq`: what `--method gptq` does.
- `refined`: then the scales of every row are solved once more for its integers, by least squares under the Hessian.
- `shifted`: the target of every module is what makes up, on the inputs that the quantized blocks before it give, for
  the outputs that the 16-bit model has on its own (GPTAQ, arXiv 2504.02692), damped.
- `half`: half of that shift (QEP, arXiv 2504.09629).
- `scaled`: AWQ's input scales for what a norm feeds (arXiv 2306.00978), then GPTQ on the scaled weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beginnings_table import UNMEASURED, opened
from pages import write_tables
from rows import conditions
from torch import Tensor, nn

from quant_fairness_plugin.artifacts import write_atomically

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "effort_table.jsonl"
PAGE = ROOT / "docs" / "calibration.md"
MODELS = ("demo", "demo-gpt2", "SmolLM2-135M")
VARIANTS = ("gptq", "refined", "shifted", "half", "scaled", "refined half", "refined shifted")
SHIFT_DAMP = 0.05
"""Share of the mean Hessian diagonal that holds the shift back where the calibration text says little."""
SEED = 0
DRAWS = 2000


@dataclass
class Seen:
    """Moments of one module's inputs: of the quantized prefix, and across with the 16-bit prefix."""

    moment: dict[str, Tensor] = field(default_factory=dict)
    across: dict[str, Tensor] = field(default_factory=dict)
    magnitude: dict[str, Tensor] = field(default_factory=dict)


def inputs(block: nn.Module, names: list[str], batch: Any, layer: int) -> dict[str, Tensor]:
    """Return what modules of a block are given on a batch, `[tokens, cols]`."""
    found: dict[str, Tensor] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: found.__setitem__(name, given[0].detach().flatten(0, -2).double())
        )
        for name in names
    ]
    batch.run(block, layer)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def quantize(loaded: Any, calibration: Any, grid: Any, variant: str) -> dict[str, Tensor]:
    """Return the dense weights of a variant; the model is as it was before."""
    from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
    from quant_fairness_plugin.quantize.blocks import first_inputs
    from quant_fairness_plugin.quantize.selection import select_modules

    selection = select_modules(loaded, grid, protected=(), overrides={})
    batches = first_inputs(loaded, calibration, batch_tokens=2048)
    pure = [replace(batch, hidden=batch.hidden.clone()) for batch in batches]
    dense: dict[str, Tensor] = {}
    for layer in range(loaded.layers):
        block, original = loaded.block(layer), copy.deepcopy(loaded.block(layer))
        prefix = f"{loaded.family.blocks}.{layer}."
        groups = [[name.removeprefix(prefix) for name in unit] for unit in selection.units.get(layer, ())]
        wanted = [inputs(original, [unit[0] for unit in groups], batch, layer) for batch in pure]
        for unit in groups:
            seen = Seen()
            for batch, right in zip(batches, wanted, strict=True):
                given = inputs(block, unit[:1], batch, layer)[unit[0]]
                add(seen, batch.language, given, right[unit[0]])
            for name in unit:
                weight = linear_weight(original.get_submodule(name)).double()
                solved = solve(weight, seen, calibration, selection.grids[prefix + name], variant, fed_by_norm(unit[0]))
                dense[prefix + name] = solved.float()
                set_linear_weight(block.get_submodule(name), solved.float())
        for batch, right in zip(batches, pure, strict=True):
            batch.hidden, right.hidden = batch.run(block, layer), right.run(original, layer)
        block.load_state_dict(original.state_dict())
        sys.stderr.write(f"layer {layer}\n")
    return dense


def fed_by_norm(module: str) -> bool:
    """Return whether a norm stands in front, which takes scales without more ado."""
    return module.rsplit(".", 1)[-1] in ("q_proj", "gate_proj", "c_attn", "c_fc")


def add(seen: Seen, language: str, given: Tensor, right: Tensor) -> None:
    """Add a batch to the sums of its language."""
    for sums, value in (
        (seen.moment, given.T @ given),
        (seen.across, (right - given).T @ given),
        (seen.magnitude, given.abs().sum(0)),
    ):
        sums[language] = sums[language] + value if language in sums else value


def solve(weight: Tensor, seen: Seen, calibration: Any, grid: Any, variant: str, scalable: bool) -> Tensor:
    """Return the dense weight of one module, float64 `[rows, cols]`."""
    from quant_fairness_plugin.quantize.gptq import solve_gptq
    from quant_fairness_plugin.quantize.methods.gptq import Gptq

    hessian, across = torch.zeros_like(next(iter(seen.moment.values()))), 0.0
    for language, moment in seen.moment.items():
        share = calibration.shares[language] / float(((weight @ moment) * weight).sum())
        hessian, across = hessian + share * moment, across + share * seen.across[language]
    target, scale = weight, torch.ones(len(hessian), dtype=weight.dtype)
    if "shifted" in variant or "half" in variant:
        damped = hessian.clone()
        damped.diagonal().add_(SHIFT_DAMP * hessian.diagonal().mean())
        target = weight + (0.5 if "half" in variant else 1.0) * torch.linalg.solve(damped, (weight @ across).T).T
    if variant == "scaled" and scalable:
        scale = input_scale(weight, hessian, seen, calibration, grid)
    under = hessian / torch.outer(scale, scale)
    usual = Gptq()
    wanted = (target * scale).float()
    found = solve_gptq(wanted, under, grid, scale_dtype=torch.float16, damp=usual.damp, act_order=usual.act_order)
    tensor = found.tensor
    if "refined" in variant:
        tensor = refined(target * scale, under, tensor)
    return tensor.dequantize().double() / scale


def refined(weight: Tensor, hessian: Tensor, tensor: Any) -> Any:
    """Return the same integers with the scales of every row at the least output error."""
    rows, groups = tensor.scales.shape
    levels = tensor.integers.double().view(rows, groups, -1) - tensor.zeros.double().unsqueeze(2)
    size = levels.shape[2]
    system, right = levels.new_zeros(rows, groups, groups), levels.new_zeros(rows, groups)
    wanted = weight @ hessian
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        reach = (levels[:, group] @ hessian[part]).view(rows, groups, size)
        system[:, group] = (reach * levels).sum(2)
        right[:, group] = (levels[:, group] * wanted[:, part]).sum(1)
    system.diagonal(dim1=1, dim2=2).add_(1e-3 * system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    right += 1e-3 * (system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) * tensor.scales.double())
    scales = torch.linalg.solve(system, right).to(tensor.scales.dtype)
    usable = torch.isfinite(scales).all(1, keepdim=True) & (scales > 0)
    return replace(tensor, scales=torch.where(usable, scales, tensor.scales))


def input_scale(weight: Tensor, hessian: Tensor, seen: Seen, calibration: Any, grid: Any) -> Tensor:
    """Return AWQ's scale of the input channels, by rounding to nearest."""
    from quant_fairness_plugin.quantize.awq import _search_scale

    magnitude = sum(calibration.shares[name] * value / value.mean() for name, value in seen.magnitude.items())
    plain = replace(grid, clip="absmax")
    found = _search_scale(
        {"w": weight.float()}, {"w": hessian.float()}, magnitude.float(), {"w": plain},
        scale_dtype=torch.float16, effective=lambda scale: scale,
    )  # fmt: skip
    return found.double()


def measure(given: argparse.Namespace) -> None:
    """Measure variants and put their rows in place of their old ones."""
    torch.set_num_threads(1)
    base = opened(given)
    options = "".join(f" --{name} {value}" for name in ("langs", "sentences") if (value := getattr(given, name)))
    for variant in given.variants:
        command = f"python benchmarks/effort_table.py measure {given.model} '{variant}'{options}"
        row = {"model": given.model, "variant": variant} | conditions(command=command, seed=SEED)
        row |= run(base, variant)
        kept = [r for r in read_rows() if (r["model"], r["variant"]) != (given.model, variant)]
        rows = sorted([*kept, row], key=lambda r: (MODELS.index(r["model"]), VARIANTS.index(r["variant"])))
        write_atomically(ROWS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())


def run(base: Any, variant: str) -> dict[str, Any]:
    """Return the row of a variant, with the KL of every sentence."""
    from quant_fairness_plugin.measure.guards import byte_unigram_bpb, support
    from quant_fairness_plugin.measure.metrics import bits_per_byte
    from quant_fairness_plugin.measure.scoring import ModelState, fixed_state, score_states
    from quant_fairness_plugin.model.exchange import stored_form, swapped
    from quant_fairness_plugin.quantize.calibration import build_calibration

    loaded, texts = base.loaded, base.texts.part("confirm")
    calibration = build_calibration(loaded.tokenizer, base.texts)
    began = time.process_time()
    dense = quantize(loaded, calibration, base.config.grid, variant)
    seconds = time.process_time() - began
    weights = {name: stored_form(loaded.model.get_submodule(name), value) for name, value in dense.items()}
    states = [fixed_state("16 bit", loaded.model), ModelState(variant, lambda: swapped(loaded, weights))]
    scores = score_states(states, loaded.tokenizer, texts)
    sums = {n: {"kl_nats": list(s.kl_nats), "bytes": list(s.bytes_)} for n, s in scores[variant].languages.items()}
    spent = {n: bits_per_byte(sum(s.nll_nats), sum(s.bytes_)) for n, s in scores["16 bit"].languages.items()}
    supported = [n for n, bits in spent.items() if support(bits, byte_unigram_bpb(texts.sentences[n])) is None]
    sys.stderr.write(f"{variant}: {seconds:.0f} s\n")
    return {
        "grid": str(base.config.grid), "quantize_cpu_seconds": seconds, "sentences": len(texts), "kl": sums,
        "supported": supported, "calibrated_on": calibration.summary(), "text_sha256": texts.sha256, "part": "confirm",
    }  # fmt: skip


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []


def resampled(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the worst and the mean KL in bits per byte: the estimate, then `DRAWS` resamples of the sentences."""
    count = row["sentences"]
    draws = np.random.default_rng(SEED).integers(0, count, (DRAWS, count))
    picks = np.concatenate([np.arange(count)[None], draws])
    by_language = []
    for language in row["supported"]:
        kl, sizes = (np.array(row["kl"][language][key], dtype=float) for key in ("kl_nats", "bytes"))
        by_language.append(kl[picks].sum(1) / sizes[picks].sum(1) / np.log(2))
    table = np.stack(by_language)
    return table.max(0), table.mean(0)


def tables() -> dict[str, str]:
    """Return the Markdown table by name."""
    lines = [
        "| model | variant | worst KL | lowered by | mean KL | lowered by | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    rows = read_rows()
    if not rows:
        return {"effort": UNMEASURED}
    for row in rows:
        first = next(r for r in rows if r["model"] == row["model"] and r["variant"] == "gptq")
        cells = []
        for before, after in zip(resampled(first), resampled(row), strict=True):
            gain = "" if row is first else figure(before - after)
            cells += [f"{1000 * after[0]:.1f}", gain]
        lines.append(f"| {row['model']} | {row['variant']} | {' | '.join(cells)} | {row['quantize_cpu_seconds']:.0f} |")
    return {"effort": "\n".join([*lines, ""])}


def figure(values: np.ndarray) -> str:
    """Return `3.1 [1.0, 5.2]`, thousandths: the estimate and its 95 % interval."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{1000 * values[0]:.1f} [{1000 * low:.1f}, {1000 * high:.1f}]"


def render() -> None:
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("model", nargs="?", default="demo", choices=MODELS)
    parser.add_argument("variants", nargs="*", default=["gptq"])
    parser.add_argument("--folder", help="where the model lies, unless it is bundled")
    parser.add_argument("--langs")
    parser.add_argument("--sentences", type=int, help="of the confirm part; all by default")
    given = parser.parse_args()
    if given.what == "render":
        render()
    else:
        measure(given)


if __name__ == "__main__":
    main()
