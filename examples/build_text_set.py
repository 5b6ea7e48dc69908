"""Build the bundled parallel text set from a folder of `<lang>.txt`.

Every file holds 180 lines, line i the same sentence in every language: 1-90 in the narrative register, 91-180 in the
everyday register. Writes `parallel.jsonl` (one row per sentence: id, part, register, then a column per language) and
`parallel.sha256` beside it. The parts `calibrate` 40, `search` 70 and `confirm` 70 are disjoint, half narrative and
half everyday, and depend on the seed alone, so a corrected translation does not move any sentence.

    python examples/build_text_set.py FOLDER
    python examples/build_text_set.py FOLDER --out elsewhere
    python examples/build_text_set.py FOLDER --documents

With `--documents` every file holds 60 documents of its language alone, a line each, and `documents.jsonl` is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from quant_fairness_plugin.artifacts import write_atomically
from quant_fairness_plugin.errors import ArtifactError, QuantFairnessError
from quant_fairness_plugin.texts.documents import BUNDLED_DOCUMENTS
from quant_fairness_plugin.texts.lines import read_lines
from quant_fairness_plugin.texts.load import BUNDLED
from quant_fairness_plugin.texts.parts import split_parts
from quant_fairness_plugin.texts.sentences import RawTexts, clean_sentence
from quant_fairness_plugin.texts.sources import read_folder

REGISTERS = ("narrative",) * 90 + ("everyday",) * 90
FIRST_COLUMN = "en"
KINDS = (
    ("news",) * 12 + ("how-to",) * 10 + ("informal",) * 10 + ("explanation",) * 10
    + ("question",) * 6 + ("technical",) * 6 + ("official",) * 6
)  # fmt: skip
"""Registers of the documents, in the order of their lines."""


def check(raw: RawTexts, folder: Path) -> None:
    """Refuse what a reader would have to repair: another number of lines, no English, a sentence written twice."""
    if len(raw.ids) != len(REGISTERS):
        raise ArtifactError(f"{folder}: {len(raw.ids)} lines in each file; expected {len(REGISTERS)}")
    if FIRST_COLUMN not in raw.sentences:
        raise ArtifactError(f"{folder}: no {FIRST_COLUMN}.txt; it is the text that the others translate")
    for language, rows in raw.sentences.items():
        lines: dict[str, list[int]] = {}
        for number, text in enumerate(rows, start=1):
            lines.setdefault(text, []).append(number)
        if twice := [numbers for numbers in lines.values() if len(numbers) > 1]:
            raise ArtifactError(f"{folder}/{language}.txt: the same sentence in lines {twice}; reword one of them")


def to_jsonl(raw: RawTexts, seed: int) -> bytes:
    """The rows as UTF-8 lines of JSON, English first and the other languages by tag."""
    languages = [FIRST_COLUMN, *sorted(set(raw.sentences) - {FIRST_COLUMN})]
    parts = split_parts(len(REGISTERS), REGISTERS, seed)
    lines = []
    for index, (part, register) in enumerate(zip(parts, REGISTERS, strict=True)):
        row = {"id": f"{register[0]}{index % 90 + 1:03d}", "part": part, "register": register}
        row |= {language: raw.sentences[language][index] for language in languages}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def build(folder: Path, out: Path, seed: int) -> str:
    """Write the set into the folder `out`; returns one line that says what was written."""
    raw = read_folder(folder)
    check(raw, folder)
    content = to_jsonl(raw, seed)
    checksum = hashlib.sha256(content).hexdigest()
    target = out / BUNDLED.name
    write_atomically(target, content)
    write_atomically(target.with_suffix(".sha256"), f"{checksum}  {target.name}\n".encode())
    counts = Counter(split_parts(len(REGISTERS), REGISTERS, seed))
    split = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{target}: {len(raw.sentences)} languages x {len(raw.ids)} sentences ({split}), sha256 {checksum}"


def build_documents(folder: Path, out: Path) -> str:
    """Write the documents into the folder `out`; returns one line that says what was written.

    Raises:
        ArtifactError: another number of lines, or a damaged text.
    """
    lines, languages = [], 0
    for path in sorted(folder.glob("*.txt")):
        rows = [clean_sentence(row, f"{path} line {i}") for i, row in enumerate(read_lines(path), 1) if row.strip()]
        if len(set(rows)) != len(KINDS):
            raise ArtifactError(f"{path}: {len(set(rows))} different documents; expected {len(KINDS)}")
        languages += 1
        for kind, text in zip(KINDS, rows, strict=True):
            row = {"language": path.stem, "register": kind, "text": text}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    checksum = hashlib.sha256(content).hexdigest()
    target = out / BUNDLED_DOCUMENTS.name
    write_atomically(target, content)
    write_atomically(target.with_suffix(".sha256"), f"{checksum}  {target.name}\n".encode())
    return f"{target}: {languages} languages x {len(KINDS)} documents, sha256 {checksum}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of <lang>.txt")
    parser.add_argument("--out", type=Path, default=BUNDLED.parent, help="where to write (default: the package data)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    parser.add_argument("--documents", action="store_true", help="text to calibrate on, of each language by itself")
    args = parser.parse_args(arguments)
    try:
        print(build_documents(args.folder, args.out) if args.documents else build(args.folder, args.out, args.seed))
    except QuantFairnessError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
