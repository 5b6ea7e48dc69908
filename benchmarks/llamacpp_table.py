"""What llama.cpp itself computes with the GGUF files of the peers' table: KL to the 16-bit model, language by language.

    make real peers                                                       # llama.cpp's tools among others
    python benchmarks/peers_table.py make SmolLM2-135M --variants "quant-fairness, GGUF" "llama.cpp Q4_K_M"
    python benchmarks/llamacpp_table.py measure SmolLM2-135M              # adds the rows
    python benchmarks/llamacpp_table.py render                            # the table of docs/peers.md

The peers' table measures weights, in float32. llama.cpp also rounds what goes into its products, so its own tool
`llama-perplexity` is run on the first of the `confirm` sentences: rows of 128 tokens, of which it scores the second
half.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pages import write_tables
from peers_table import note, sixteen_bit_gguf, slug
from peers_variants import ENVIRONMENTS, LANGUAGES, MODELS, ROOT, SEED, VARIANTS
from rows import conditions

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.texts.load import load_texts

ROWS = ROOT / "benchmarks" / "results" / "cpu" / "llamacpp_table.jsonl"
PAGE = ROOT / "docs" / "peers.md"
CONTEXT = 128
ROWS_OF_TEXT = 8
"""Of each language; some seconds each on one core."""
MEAN = re.compile(r"Mean\s+KLD:\s+(-?[\d.]+)\s+±\s+([\d.]+)")
SAME_TOP = re.compile(r"Same top p:\s+([\d.]+)\s+±")


def measure(name: str, model: str, work: Path) -> None:
    """Put the rows of every GGUF file of a model in place of their old ones."""
    made = [each for each in VARIANTS if (work / slug(each) / "model.gguf").is_file()]
    texts = load_texts("bundled", languages=LANGUAGES).part("confirm")
    rows = [row for row in read_rows() if row["model"] != name]
    with tempfile.TemporaryDirectory() as folder:
        full = sixteen_bit_gguf(model, work / "sixteen-bit.gguf")
        found: dict[str, dict[str, Any]] = {each: {} for each in made}
        for language in LANGUAGES:
            text, base = Path(folder) / "text.txt", Path(folder) / "base.bin"
            text.write_text("\n".join(texts.sentences[language]), encoding="utf-8")
            run(full, text, "--kl-divergence-base", base)
            for each in made:
                said = run(work / slug(each) / "model.gguf", text, "--kl-divergence-base", base, "--kl-divergence")
                found[each][language] = parsed(said)
    common = conditions(command=f"python benchmarks/llamacpp_table.py measure {name}", seed=SEED)
    for each in made:
        file = json.loads(note(work, each).read_text("utf-8"))
        rows.append(
            {"model": name, "variant": each, "calibration": VARIANTS[each].calibration}
            | {"context": CONTEXT, "rows_of_text": ROWS_OF_TEXT, "tool_versions": {"llama-cpp-python": version()}}
            | {"languages": found[each], "weight_bytes": file["weight_bytes"], "made_at": file["made_at"]} | common
        )  # fmt: skip
    write_atomically(ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def run(model: Path, text: Path, *options: str | Path) -> str:
    """Run llama.cpp's perplexity tool on a file; return what it prints."""
    tool = ROOT / ENVIRONMENTS["llamacpp"] / "bin" / "llama-perplexity"
    command = [tool, "-m", model, "-f", text, "-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1"]
    command += ["--chunks", str(ROWS_OF_TEXT), *options]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{tool.name}: status {ended.returncode}: {ended.stderr[-500:]}")
    return ended.stdout + ended.stderr


def version() -> str:
    """Return the version of the package whose source llama.cpp was built from."""
    return (ROOT / ENVIRONMENTS["llamacpp"] / "src").resolve().parents[1].name.rpartition("-")[2]


def parsed(said: str) -> dict[str, float]:
    """Return the mean KL in nats per token with its standard error, and how often the likeliest token is the same."""
    mean, same = MEAN.search(said), SAME_TOP.search(said)
    if mean is None or same is None:
        raise SystemExit(f"llama-perplexity printed no mean KLD: {said[-500:]}")
    return {"kl_nats": float(mean[1]), "standard_error": float(mean[2]), "same_top_percent": float(same[1])}


def read_rows() -> list[dict[str, Any]]:
    """Return the stored rows."""
    return [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []


def tables() -> dict[str, str]:
    """Return the Markdown table by name."""
    lines = ["| model | file | MB | " + " | ".join(LANGUAGES) + " |", "|---|---|---:|" + "---:|" * len(LANGUAGES)]
    for row in read_rows():
        cells = [
            f"{1000 * found['kl_nats']:.0f} ± {1000 * found['standard_error']:.0f}"
            for found in (row["languages"][language] for language in LANGUAGES)
        ]
        lines.append(f"| {row['model']} | {row['variant']} | {row['weight_bytes'] / 1e6:.1f} | {' | '.join(cells)} |")
    return {"llama.cpp": "\n".join([*lines, ""])}


def render() -> None:
    """Write the table into its page."""
    write_tables(PAGE, tables())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "render"))
    parser.add_argument("model", nargs="?", choices=MODELS, default="SmolLM2-135M")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "peers")
    given = parser.parse_args()
    if given.what == "render":
        render()
    else:
        measure(given.model, MODELS[given.model], given.work / given.model)


if __name__ == "__main__":
    main()
