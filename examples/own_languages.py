"""Your languages and your texts: one file for each language, line i the same sentence in all of them.

python examples/own_languages.py [MODEL] [OUT]

A TSV or JSONL file with a column for each language does as well; the order of the lines is kept, and the set is split
into sentences to calibrate on, to choose on and to report on.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from quant_fairness import FairQuantizer, load_texts

WORDS = {  # stand for your own files; a real set has 200 sentences or more
    "en": ("The house|The river|The stone|The bread|The lamp", "is here|is new|was old|is ours"),
    "de": ("Das Haus|Der Fluss|Der Stein|Das Brot|Die Lampe", "ist da|ist neu|war alt|ist hier"),
}


def main(model: str = "demo", out: str = "int4-own", folder: str = "own-texts") -> None:
    Path(folder).mkdir(exist_ok=True)
    for language, (things, states) in WORDS.items():
        lines = "".join(f"{thing} {state}.\n" for thing, state in product(things.split("|"), states.split("|")))
        (Path(folder) / f"{language}.txt").write_text(lines, encoding="utf-8")

    quantizer = FairQuantizer.from_pretrained(model, texts=load_texts(folder), protect_layers="none")
    measurement = quantizer.save_pretrained(out, overwrite=True).measurement
    for damage in measurement.languages:
        print(damage.language, damage.status, f"{damage.kl_bits_per_byte.estimate:.5f} bits per byte")
    print(measurement.condition or f"on {damage.sentences} sentences that nothing was chosen on")


if __name__ == "__main__":
    main(*sys.argv[1:])
