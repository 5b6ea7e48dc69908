"""What differs between kinds of CPU: a small model planned and quantized with each set of instructions of PyTorch.

    python benchmarks/capabilities.py                # some minutes; writes the rows anew
    python benchmarks/capabilities.py render         # the table of docs/reliability.md from the rows

`ATEN_CPU_CAPABILITY` makes PyTorch use the code of an older CPU on a newer one; MKL, which multiplies matrices, is
asked for the same by `MKL_CBWR`. The model is the planted one of the tests, on which the same commands run in processes
of their own, with one thread. The first set is what the others are compared with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.commands import ENTRY  # noqa: E402 - found by the path above
from benchmarks.pages import write_tables  # noqa: E402
from benchmarks.rows import conditions  # noqa: E402

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "capabilities.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
KINDS = {"avx512": "AVX512", "avx2": "AVX2", "default": "COMPATIBLE"}
"""PyTorch's name → MKL's."""
TEXTS = ("--texts", "t.json")
PLAN = ("recommend", "--model", "model", *TEXTS, "--max-overhead", "0.3", "-o", "plan.json")
QUANTIZE = (
    "quantize",
    "model",
    *TEXTS,
    "--group-size",
    "32",
    "--protect-layers",
    "2",
    "-o",
    "out",
    "--prompts",
    "none",
)
BITS = 4


def main() -> None:
    if sys.argv[1:] == ["render"]:
        return render()
    from quant_fairness_plugin.artifacts import write_atomically

    found = {}
    with tempfile.TemporaryDirectory(prefix="capabilities-") as name:
        for kind, mkl in KINDS.items():
            made = make(Path(name) / kind, {"ATEN_CPU_CAPABILITY": kind, "MKL_CBWR": mkl})
            found[kind] = compare(made, found[next(iter(KINDS))]["made"] if found else made) | {"made": made}
    rows = [
        {"capability": kind} | {key: value for key, value in row.items() if key != "made"}
        for kind, row in found.items()
    ]
    told = conditions(command="python benchmarks/capabilities.py", seed=0)
    write_atomically(ROWS, "".join(json.dumps(row | told) + "\n" for row in rows).encode())
    for row in rows:
        sys.stdout.write(f"{row}\n")


def make(place: Path, environment: dict[str, str]) -> Path:
    """Plan and quantize in a folder of its own."""
    from tests.faults.cases import write_start

    place.mkdir()
    write_start(place)
    settings = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in (PLAN, QUANTIZE):
        subprocess.run(
            [sys.executable, "-c", ENTRY, *command], cwd=place, env=settings, check=True, capture_output=True
        )
    return place


def compare(made: Path, first: Path) -> dict[str, Any]:
    """Return how far what was made is from what was made first."""
    import torch
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "out" / "model.safetensors") for folder in (made, first))
    packed = [name for name in theirs if theirs[name].dtype == torch.int32 and theirs[name].ndim == 2]
    differ = total = 0
    for name in packed:
        changed = ours[name] ^ theirs[name]
        differ += sum(int(((changed >> shift) & 15 != 0).sum()) for shift in range(0, 32, BITS))
        total += changed.numel() * 32 // BITS
    scales = [name for name in theirs if name.endswith("weight_scale")]
    kl = [figures(folder) for folder in (made, first)]
    return {
        "same_plan": (made / "plan.json").read_bytes() == (first / "plan.json").read_bytes(),
        "same_choice": chosen(made) == chosen(first),
        "same_checkpoint": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "integers": total,
        "integers_differ": differ,
        "scales_differ": sum(int((ours[name] != theirs[name]).sum()) for name in scales),
        "kl_relative_difference": max(abs(one / other - 1) for one, other in zip(*kl, strict=True)),
    }


def chosen(folder: Path) -> Any:
    """Return the units of a plan with their precisions."""
    return json.loads((folder / "plan.json").read_text(encoding="utf-8"))["units"]


def figures(folder: Path) -> list[float]:
    """Return the KL of every language of the export's record."""
    record = json.loads((folder / "out" / "quant_fairness.json").read_text(encoding="utf-8"))
    return [row["kl_bits_per_byte"]["estimate"] for row in record["measurement"]["languages"]]


def render() -> None:
    """Write the table into its page."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    lines = [
        "| instructions | the plan's choice | integers that differ | scales | KL differs by |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        share = f"{row['integers_differ']} of {row['integers']:,}"
        choice = "the same" if row["same_choice"] else "another"
        cells = [row["capability"], choice, share, row["scales_differ"], f"{row['kl_relative_difference']:.1e}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    write_tables(PAGE, {"capabilities": "\n".join(lines) + "\n" if rows else "No run is stored.\n"})


if __name__ == "__main__":
    main()
